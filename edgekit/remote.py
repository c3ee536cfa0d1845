"""bench, run, eval and probe on a device: bring the model over, have `far_side` work, take it back.

Knows which files a task needs there and what its answer must look like; never how a device is
reached. Nothing that a board says is trusted: answers are read as strictly as a stranger's files.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from edgekit import (
    __version__,
    _proc,
    graph_file,
    language_header,
    language_model,
    report,
    typed_json,
)
from edgekit.artifact import Artifact, is_artifact
from edgekit.bench import bench
from edgekit.bench_models import file_of
from edgekit.bench_plan import Sweep
from edgekit.bench_prediction import predicted, profile_of
from edgekit.board_link import printable
from edgekit.device_config import LOCAL
from edgekit.device_probe import Measured
from edgekit.errors import EdgekitError, RemoteCommandError, UsageError
from edgekit.evaluate import Divergence, Perplexity
from edgekit.exporter import Progress, no_progress
from edgekit.formats import onnx
from edgekit.intervals import Interval
from edgekit.report import BenchReport
from edgekit.runtime import GenerateParams, Generation, TokenLogprob
from edgekit.target import BoardFacts, Local, Target, open_target

# Between two signs of progress; the line itself has its own signs of life.
_SILENCE_S = 3600
EMULATED = "this board is emulated: its times say nothing of a real one"
_WORDS = 20  # lines of stderr that are kept
_Figures = TypeVar("_Figures", Perplexity, Divergence)
_Found = TypeVar("_Found")


def bench_on(
    target: Target,
    *models: str | Path,
    probe: bool = True,
    progress: Progress = no_progress,
    **sweep: Any,
) -> BenchReport:
    """The same bench as ``edgekit.bench``, on a device; the report says which, and if emulated.

    Raises what ``bench`` raises, and DeviceError.
    """
    if not models:
        raise UsageError("which model?", hint="edgekit bench ARTIFACT")
    for model in models:
        file_of(model)  # a bad one is not worth the way, nor are settings that are none
    Sweep(**sweep)
    facts = target.identify()
    profile = profile_of(target.name, facts.board, facts.memory_bytes)
    arguments = {
        "models": [bring(target, Path(model), progress) for model in models],
        "names": [Path(model).resolve().name for model in models],
        "judge": probe,
        "sweep": sweep,
    }
    body = call(target, facts, "bench", arguments, progress=progress)
    raw = json.dumps(body).encode("utf-8", "replace")
    found = report.parse(raw, origin=f"what {target.name} sent")
    remarks = (EMULATED, *found.remarks) if facts.emulated else found.remarks
    machine = replace(found.machine, emulated=facts.emulated)
    headers = {
        sent.name: language_header.read(file_of(model))
        for sent, model in zip(found.models, models, strict=False)
    }
    found = replace(found, device=called(target, facts), machine=machine, remarks=remarks)
    return predicted(found, headers, profile)


def called(target: Target, facts: BoardFacts) -> str:
    """The user's name for a device; reports travel, and hosts and users are no names to show."""
    if target.name.replace("-", "").replace("_", "").isalnum():
        return target.name
    return facts.board or facts.cpu or "a board"


def bench_devices(
    names: Sequence[str],
    *models: str | Path,
    progress: Callable[[str], Progress],
    **options: Any,
) -> dict[str, BenchReport | EdgekitError]:
    """``bench_on`` for several devices side by side, as ``on_devices`` does it."""
    return on_devices(
        names,
        lambda target, tell: bench_on(target, *models, progress=tell, **options),
        lambda tell: bench(*models, progress=tell, **options),
        progress,
    )


def on_devices(
    names: Sequence[str],
    there: Callable[[Target, Progress], _Found],
    here: Callable[[Progress], _Found],
    progress: Callable[[str], Progress],
) -> dict[str, _Found | EdgekitError]:
    """``there`` on several devices side by side; ``here``, for "local", when they are done.

    ``progress`` gives each device its own. A device that fails leaves its error in its place.
    """
    if len(set(names)) < len(names):
        raise UsageError("--device names a device twice")
    found: dict[str, _Found | EdgekitError] = {}
    opened: list[Target] = []

    def work(name: str) -> None:
        try:
            with open_target(name) as target:
                opened.append(target)
                found[name] = there(target, progress(name))
        except EdgekitError as error:
            found[name] = error

    boards = [name for name in names if name != LOCAL]
    if len(boards) == 1:
        work(boards[0])  # in this thread, which a signal interrupts
    else:
        _side_by_side(work, boards, opened)
    if LOCAL in names:
        try:
            found[LOCAL] = here(progress(LOCAL))
        except EdgekitError as error:
            found[LOCAL] = error
    return {name: found[name] for name in names}


def _side_by_side(work: Callable[[str], None], names: Sequence[str], opened: list[Target]) -> None:
    """``work`` for every name in a thread of its own; a signal closes what they opened."""
    broken: list[BaseException] = []

    def guarded(name: str) -> None:
        try:
            work(name)
        except BaseException as error:
            broken.append(error)

    # Daemons: a Ctrl-C does not wait for one that still connects.
    threads = [threading.Thread(target=guarded, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
    except BaseException:
        for target in opened:
            target.close()
        raise
    for error in broken:
        raise error


def run_on(
    target: Target,
    model: str | Path,
    prompt: str,
    *,
    params: GenerateParams,
    fields: dict[str, Any],
    system: str | None = None,
    raw: bool = False,
    runtime: str | None = None,
    on_piece: Callable[[str], None],
    progress: Progress = no_progress,
) -> Generation:
    """An answer of the model on the device; ``on_piece`` hears it as it comes.

    ``fields`` are those of LoadParams. Raises what ``load`` and a session raise, and DeviceError.
    """
    _check_language(Path(model))
    facts = target.identify()

    def on_report(message: dict[str, Any]) -> None:
        if isinstance(message.get("piece"), str):
            on_piece(message["piece"])

    arguments = {
        "model": bring(target, Path(model), progress),
        "prompt": prompt,
        "system": system,
        "raw": raw,
        "params": vars(params),
        "fields": _load_fields(target, fields, progress),
        "runtime": runtime,
    }
    return _generation(target, call(target, facts, "run", arguments, on_report=on_report))


def embed_on(
    target: Target,
    model: str | Path,
    text: str,
    *,
    pooling: str,
    fields: dict[str, Any],
    progress: Progress = no_progress,
) -> list[float]:
    """The embedding of a text, made on the device."""
    _check_language(Path(model))
    arguments = {
        "model": bring(target, Path(model), progress),
        "text": text,
        "pooling": pooling,
        "fields": _load_fields(target, fields, progress),
    }
    found = call(target, target.identify(), "embed", arguments)
    if not isinstance(found, list) or not all(_is_number(value) for value in found):
        raise nonsense(target)
    return found


def perplexity_on(
    target: Target, model: str | Path, text: str, *, progress: Progress = no_progress, **fields: Any
) -> Perplexity:
    """``evaluate.perplexity`` on the device."""
    _check_language(Path(model))
    arguments = {"model": bring(target, Path(model), progress), "text": text, **fields}
    found = call(target, target.identify(), "perplexity", arguments, progress=progress)
    return _figures(target, Perplexity, found)


def compare_on(
    target: Target,
    model: str | Path,
    reference: str | Path,
    text: str,
    *,
    progress: Progress = no_progress,
    **fields: Any,
) -> Divergence:
    """``evaluate.compare`` on the device."""
    for each in (model, reference):
        _check_language(Path(each))
    arguments = {
        "model": bring(target, Path(model), progress),
        "reference": bring(target, Path(reference), progress),
        "text": text,
        **fields,
    }
    found = call(target, target.identify(), "compare", arguments, progress=progress)
    return _figures(target, Divergence, found)


def probe_on(target: Target, *, progress: Progress = no_progress) -> Measured:
    """The limits of the device for several counts of threads, and its storage: under a minute."""
    found = call(target, target.identify(), "probe", {}, progress=progress)
    try:
        return typed_json.read(Measured, found, "the probe")
    except typed_json.Mismatch:
        raise nonsense(target) from None


# The way there and back


def call(
    target: Target,
    facts: BoardFacts,
    task: str,
    arguments: dict[str, Any],
    *,
    progress: Progress = no_progress,
    on_report: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """Have ``far_side`` do a task there; what it raises is raised here again.

    Raises RemoteCommandError if edgekit is not set up there, is another version, or dies.
    """
    answer: dict[str, Any] = {}
    words: list[str] = []

    def on_line(stream: str, line: str) -> None:
        if stream == "stderr":
            words.append(line)
            del words[:-_WORDS]
            return
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise nonsense(target) from None
        if not isinstance(message, dict):
            raise nonsense(target)
        told = message.get("report")
        if "value" in message or "error" in message:
            answer.update(message)
        elif isinstance(told, dict) and "progress" in told:
            _pass_on(told["progress"], progress)
        elif isinstance(told, dict) and on_report is not None:
            on_report(told)

    argv = [_python(target, facts), "-P", "-m", "edgekit.far_side"]
    home = None if isinstance(target, Local) else facts.home
    request = json.dumps({"task": task, "arguments": arguments, "home": home}).encode()
    done = target.run(argv, stdin=request, on_line=on_line, silence_s=_SILENCE_S)
    if not answer:
        last = printable(words[-1]) if words else "it said nothing"
        raise RemoteCommandError(
            f"edgekit on {target.name} {_proc.describe_exit(done.code)}: {last}",
            hint="out of memory? `dmesg` there knows",
        )
    if "error" in answer:
        for key in ("message", "hint", "extra", "missing"):
            if isinstance(answer.get(key), str):
                answer[key] = printable(answer[key])
        answer["message"] = f"{target.name}: {answer.get('message')}"
    return _proc.value_of(answer)


def _python(target: Target, facts: BoardFacts) -> str:
    """The Python there that has edgekit."""
    if isinstance(target, Local):
        return sys.executable
    hint = f"edgekit devices setup {target.name}"
    if facts.edgekit is None:
        raise RemoteCommandError(f"{target.name} has no edgekit", hint=hint)
    if facts.edgekit != __version__:
        raise RemoteCommandError(
            f"{target.name} has edgekit {facts.edgekit}, this one is {__version__}", hint=hint
        )
    return f"{facts.home}/venv/bin/python"


def _check_language(model: Path) -> None:
    """Before anything is uploaded."""
    file = Artifact.open(model).model_path if is_artifact(model) else model
    if file.suffix.lower() in graph_file.FORMATS and not language_header.is_onnx(file):
        raise UsageError(f"{model} is no language model", hint="edgekit run and bench take it")


def bring(target: Target, path: Path, progress: Progress, also: Sequence[str] | None = None) -> str:
    """A model's path on the device, where it is now; ``also`` as in ``Target.put``, by default the
    files that a bare language model needs beside it.
    """
    if isinstance(target, Local):
        return str(path.absolute())
    beside = _beside(path) if also is None else also
    place = target.put(path, kind="artifacts", also=beside, progress=progress)
    return f"{place}/{path.name}" if path.is_file() else place


def _beside(path: Path) -> list[str]:
    """Files in the folder of an ONNX language model that belong to it; an artifact has them all."""
    if is_artifact(path) or not language_header.is_onnx(path):
        return []
    texts = (language_model.FILE, language_model.TOKENIZER, language_model.TEMPLATE)
    return [*onnx.read(path).beside, *(n for n in texts if (path.parent / n).is_file())]


def _load_fields(target: Target, fields: dict[str, Any], progress: Progress) -> dict[str, Any]:
    if fields.get("prompt_cache") is not None:
        raise UsageError("--prompt-cache means nothing with --device")
    adapters = [
        [bring(target, Path(file), progress), scale] for file, scale in fields.get("adapters", ())
    ]
    return fields | {"adapters": adapters}


def _pass_on(told: Any, progress: Progress) -> None:
    kinds = [type(part) for part in told] if isinstance(told, list) else []
    if kinds == [str, int, int]:
        progress(printable(told[0]), told[1], told[2])


# What came back


def _generation(target: Target, body: Any) -> Generation:
    kinds = {name: type(getattr(Generation(), name)) for name in Generation.__dataclass_fields__}
    try:
        good = set(body) == set(kinds) and all(
            isinstance(body[name], int | float if kind is float else kind)
            for name, kind in kinds.items()
        )
        logprobs = [
            TokenLogprob(str(token), float(value), tuple((str(t), float(v)) for t, v in top))
            for token, value, top in body["logprobs"]
        ]
    except (TypeError, ValueError, KeyError):
        good = False
    if not good or not all(type(token) is int for token in body["tokens"]):
        raise nonsense(target)
    return Generation(**body | {"logprobs": logprobs})


def _figures(target: Target, kind: type[_Figures], body: Any) -> _Figures:
    """A dataclass of numbers and Intervals from its ``to_dict``."""
    if not isinstance(body, dict) or set(body) != {each.name for each in fields(kind)}:
        raise nonsense(target)
    found: dict[str, Any] = {}
    for name, value in body.items():
        if isinstance(value, dict) and set(value) == {"value", "low", "high"}:
            ends = {"value": math.nan, "low": -math.inf, "high": math.inf}
            ends |= {end: number for end, number in value.items() if number is not None}
            value, numbers = Interval(**ends), list(ends.values())
        else:
            numbers = value if isinstance(value, list) else [value]
            value = tuple(value) if isinstance(value, list) else value
        if not all(type(number) in (int, float) for number in numbers):
            raise nonsense(target)
        found[name] = value
    return kind(**found)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def nonsense(target: Target) -> RemoteCommandError:
    """For an answer that is none."""
    return RemoteCommandError(
        f"edgekit on {target.name} gives an answer that is none",
        hint=f"edgekit devices setup {target.name} brings this version there",
    )
