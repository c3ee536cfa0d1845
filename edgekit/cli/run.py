"""`edgekit run`: answer a prompt, chat in the terminal, or embed a text.

Knows options and how to show an answer; the model's work is done by ``edgekit.runtime``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from edgekit.cli import run_tensors, show
from edgekit.errors import UsageError
from edgekit.runtime import KV_TYPES, POOLINGS, GenerateParams, Generation, Session, load

_HELP = "/reset forgets the chat, /system TEXT sets a system message, /exit or Ctrl-D leaves."


def _number(name: str, text: str) -> Callable[[Any], Any]:
    """The option for a number among the generation's parameters, with its default there."""
    default = getattr(GenerateParams, name)
    flag = "--" + name.replace("_", "-")
    return click.option(flag, type=type(default), default=default, show_default=True, help=text)


@click.command()
@click.argument("artifact")
@click.argument("prompt", required=False)
@click.option("--raw", is_flag=True, help="Complete the prompt as it is, without a chat template.")
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@click.option("--embed", is_flag=True, help="Print the prompt's embedding instead of an answer.")
@click.option(
    "--pooling",
    type=click.Choice(POOLINGS),
    default=POOLINGS[0],
    show_default=True,
    help="With --embed: from the mean of all tokens, the last, or the first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@_number("max_tokens", "Tokens of the longest answer.")
@_number("temperature", "0 is greedy.")
@_number("top_p", "Take the likeliest tokens that make up this probability; 1 is off.")
@_number("top_k", "Take so many of the likeliest tokens; 0 is off.")
@_number("min_p", "Leave out what is below this part of the best probability; 0 is off.")
@_number("repeat_penalty", "Make the newest tokens less likely; 1 is off.")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer here. Repeatable.")
@click.option("--logprobs", type=int, default=0, metavar="N", help="Report N alternatives a token.")
@click.option("--json-schema", metavar="FILE|JSON", help="Answer with JSON of this schema.")
@click.option("--grammar", type=click.Path(path_type=Path), help="Answer within a GBNF grammar.")
@click.option("--speculate", is_flag=True, help="Draft repeated text; never changes the answer.")
@click.option("--n-ctx", type=int, help="Context in tokens [default: the model's, at most 4096].")
@click.option("--threads", type=int, help="CPU threads [default: measured once, remembered].")
@click.option("--n-gpu-layers", type=int, help="Layers on the GPU [default: as many as fit].")
@click.option(
    "--kv-type",
    type=click.Choice(KV_TYPES),
    default="f16",
    show_default=True,
    help="Type of the KV cache.",
)
@click.option("--no-flash-attention", is_flag=True, help="Keep off the fused attention kernels.")
@click.option("--lora", multiple=True, metavar="FILE[:SCALE]", help="Apply a LoRA. Repeatable.")
@click.option(
    "--prompt-cache", type=click.Path(path_type=Path), help="Keep the prompt's state here."
)
@click.option(
    "--top",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Classes to show, of a model that classifies.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="TEXT",
    help='Choose among these, such as "a photo of a cat", by a model of images and texts.',
)
@click.option("--runtime", metavar="NAME", help="Engine [default: the one for the format].")
@click.option("--device", metavar="NAME", help="Run there: a device of yours, or an SSH host.")
def command(
    artifact: str,
    prompt: str | None,
    raw: bool,
    system: str | None,
    embed: bool,
    pooling: str,
    as_json: bool,
    top: int,
    labels: tuple[str, ...],
    runtime: str | None,
    device: str | None,
    **options: Any,
) -> None:
    """Answer PROMPT with ARTIFACT (an artifact's folder, a GGUF, an ONNX or a TFLite file).

    For a vision model PROMPT is the file of an image; a classifier answers with classes, an encoder
    with a vector.
    A PROMPT of `-`, or none when stdin is no terminal, is read from stdin. Without a prompt on a
    terminal this is a chat. The answer goes to stdout, everything else to stderr.
    """
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace")
    interactive = prompt is None
    if interactive and (as_json or embed or raw):
        raise UsageError("--json, --embed and --raw need a prompt")
    params = _generate_params(options, endless=interactive)
    fields = _load_fields(options)
    if device is not None:
        if prompt is None:
            raise UsageError(
                "a chat needs the model here: --device answers one PROMPT",
                hint=f'edgekit run {artifact} "Why is the sky blue?" --device {device}',
            )
        if _has_no_tokens(artifact):
            run_tensors.show_answer_there(
                device, artifact, prompt, top, fields["n_threads"], as_json
            )
        elif embed:
            fields["runtime"] = runtime
            _show_vector(_embed_there(device, artifact, prompt, pooling, fields), as_json)
        else:
            how = {"system": system, "raw": raw, "runtime": runtime}
            _answer_there(device, artifact, prompt, params, fields, how, as_json)
        return
    with load(artifact, runtime=runtime, embeddings=embed, **fields) as session:
        if hasattr(session, "task"):
            run_tensors.show_answer(session, prompt, labels, top, as_json)
        elif labels:
            raise UsageError("--label is for a model of images and texts")
        elif prompt is None:
            _chat(session, params, system)
        elif embed:
            _show_vector(session.embed(prompt, pooling=pooling), as_json)
        else:
            chat = session.has_chat_template and not raw
            if system is not None and not chat:
                raise UsageError("--system needs a model with a chat template, and no --raw")
            messages = _messages(system, prompt)
            pieces = session.chat(messages, params) if chat else session.stream(prompt, params)
            _answer(session, pieces, as_json)


def _has_no_tokens(model: str) -> bool:
    from edgekit.latency import takes

    return takes(model)


def _answer_there(
    device: str,
    artifact: str,
    prompt: str,
    params: GenerateParams,
    fields: dict[str, Any],
    how: dict[str, Any],
    as_json: bool,
) -> None:
    """The answer of a model that runs on a device, shown as if it ran here."""
    from edgekit import remote  # not before it is needed: a first token is waited for
    from edgekit.target import open_target

    def on_piece(piece: str) -> None:
        if not as_json:
            click.echo(piece, nl=False)

    with show.progress(quiet=as_json) as progress, open_target(device) as target:
        done = remote.run_on(
            *(target, artifact, prompt),
            params=params,
            fields=fields,
            on_piece=on_piece,
            progress=progress,
            **how,
        )
    if as_json:
        return show.as_json(_document(done))
    click.echo()
    click.echo(f"{device}: {_stats(done)}", err=True)


def _embed_there(
    device: str, artifact: str, text: str, pooling: str, fields: dict[str, Any]
) -> list[float]:
    from edgekit import remote
    from edgekit.target import open_target

    with show.progress() as progress, open_target(device) as target:
        return remote.embed_on(
            target, artifact, text, pooling=pooling, fields=fields, progress=progress
        )


def _show_vector(vector: list[float], as_json: bool) -> None:
    if as_json:
        show.as_json({"embedding": vector})
    else:
        click.echo(" ".join(map(str, vector)))


def _answer(session: Session, pieces: Iterator[str], as_json: bool) -> None:
    for piece in pieces:
        if not as_json:
            click.echo(piece, nl=False)
    if as_json:
        show.as_json(_document(session.last))
    else:
        click.echo()
        click.echo(_stats(session.last), err=True)


def _document(done: Generation) -> dict[str, Any]:
    return {
        "text": done.text,
        "tokens": done.tokens,
        "finish_reason": done.finish_reason,
        "timings": {
            "prompt_tokens": done.prompt_tokens,
            "cached_tokens": done.cached_tokens,
            "prompt_ms": round(done.prompt_ms, 3),
            "prefill_tok_s": round(done.prefill_tok_s, 2),
            "decode_tokens": done.decode_tokens,
            "decode_ms": round(done.decode_ms, 3),
            "decode_tok_s": round(done.decode_tok_s, 2),
            "drafted_tokens": done.drafted_tokens,
            "accepted_tokens": done.accepted_tokens,
        },
        "logprobs": [
            {
                "token": entry.token,
                "logprob": entry.logprob,
                "top": [list(pair) for pair in entry.top],
            }
            for entry in done.logprobs
        ],
    }


def _stats(done: Generation) -> str:
    cached = f" ({done.cached_tokens} cached)" if done.cached_tokens else ""
    return (
        f"prefill {done.prompt_tokens} tokens{cached}, {done.prefill_tok_s:.1f} tok/s; "
        f"decode {done.decode_tokens} tokens, {done.decode_tok_s:.1f} tok/s; "
        f"ended by {done.finish_reason}"
    )


def _messages(system: str | None, prompt: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, {"role": "user", "content": prompt}]


def _chat(session: Session, params: GenerateParams, system: str | None) -> None:
    """Questions and answers until the user leaves; Ctrl-C only stops the answer at hand."""
    import readline  # noqa: F401 (gives input() its history and editing)

    messages = _messages(system, "")[:-1]
    click.echo(_HELP, err=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo(err=True)
            continue
        word, _, rest = line.partition(" ")
        if not line:
            continue
        if word == "/exit":
            return
        if word == "/help":
            click.echo(_HELP, err=True)
        elif word == "/reset":
            messages = [m for m in messages if m["role"] == "system"]
            session.reset()
        elif word == "/system":
            messages = _messages(rest, "")[:-1]
            session.reset()
        elif word.startswith("/"):
            click.echo(f"unknown command {word}. {_HELP}", err=True)
        else:
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _turn(session, messages, params)})


def _turn(session: Session, messages: list[dict[str, str]], params: GenerateParams) -> str:
    """Print one answer as it comes, and return as much of it as there was."""
    shown = ""
    pieces = session.chat(messages, params)
    try:
        for piece in pieces:
            shown += piece
            click.echo(piece, nl=False)
        click.echo()
        click.echo(f"[{session.last.decode_tok_s:.1f} tok/s]", err=True)
    except KeyboardInterrupt:
        click.echo("\n[stopped]", err=True)
    return shown


def _generate_params(options: dict[str, Any], *, endless: bool) -> GenerateParams:
    """Takes the options of a generation out of ``options``."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed")
    fields = {name: options.pop(name) for name in (*names, "stop", "logprobs", "speculate")}
    schema, grammar = options.pop("json_schema"), options.pop("grammar")
    if schema is not None:
        fields["json_schema"] = _schema(schema)
    if grammar is not None:
        fields["grammar"] = _text(grammar)
    return GenerateParams(**fields, endless=endless)


def _schema(given: str) -> Any:
    """A JSON schema from its text, or from a file."""
    text = given if given.lstrip().startswith("{") else _text(Path(given))
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError("--json-schema is not JSON") from None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None


def _load_fields(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_ctx": options["n_ctx"],
        "n_threads": options["threads"],
        "n_gpu_layers": options["n_gpu_layers"],
        "kv_type": options["kv_type"],
        "flash_attention": not options["no_flash_attention"],
        "adapters": tuple(map(_adapter, options["lora"])),
        "prompt_cache": options["prompt_cache"],
    }


def _adapter(given: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:SCALE``; a file's own name may hold a colon."""
    file, colon, scale = given.rpartition(":")
    if not colon or Path(given).exists():
        return Path(given), 1.0
    try:
        return Path(file), float(scale)
    except ValueError:
        raise UsageError(f"--lora {given}: the scale is no number") from None
