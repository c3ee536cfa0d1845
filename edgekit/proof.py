"""The proof of a language model's export: measures everything that its receipt says.

Knows the order of the measurements and when one of them disproves the export; never how an engine
or a tokenizer works, and it writes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgekit import _proc, doctor, evaluate, machine, proof_files
from edgekit.errors import EdgekitError, InferenceError, ParityError, UsageError
from edgekit.exporter import Claim, Progress
from edgekit.exporters import source_tokens
from edgekit.exporters.tokenizer_files import TokenizerFiles
from edgekit.formats import gguf
from edgekit.intervals import Interval
from edgekit.proof_files import LanguageFile
from edgekit.receipt import (
    PROVEN,
    Completion,
    Quality,
    Receipt,
    Reference,
    Size,
    Speed,
    Tokens,
    bounded,
)
from edgekit.runtimes.chat import ChatTemplate
from edgekit.scorer import memory_limit, model_files

PROMPT = "The three most important things to know about the sea are"
_ANSWER_TOKENS = 16
_N_CTX = 512
_CHUNKS = 8
_LEAST_CHUNKS = 4
# Reading the held-out text with both models may take so long, and the race so long.
_EVALUATE_S = 24.0
_RACE_S = 8.0
_RACE_PROMPT, _RACE_STEPS, _RACE_ROUNDS = 256, 24, 6
_SILENCE_S = 1800
_STAGES = {"load": "load both models", "evaluate": "compare predictions"}
_HINT = "nothing was kept; --no-receipt exports it all the same"

# Text on which tokenizers differ: what to split, what to keep, what is a control token.
TEXTS = (
    "Hello, world! It's 3.14159, isn't it? We'LL see; they'd've said: 1234567890 1,000,000",
    "  leading, trailing  and     inner spaces   ",
    "tabs\tand\n\nnewlines\r\n\n\n   \n\t end\n",
    "def f(x):\n    return {'a': x[0] ** 2, \"b\": [1, 2]}  # comment\n\n\nclass A:\n\tpass",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; } // --> <!-- &amp; %s\\n",
    "Käse, naïve café, Ünïcödé, Ελληνικά, Кириллица, ﬁne ½ ² Å",
    "العربية من اليمين إلى اليسار, עברית (1,234)",
    "日本語のテキスト、中文字符，한국어 텍스트 ไทย हिन्दी",
    "🚀 rocket 👩‍👩‍👧 family 🏳️‍🌈 flag ✅ 👍🏽 1️⃣",
    "''''''```````\"\"\"\"......!!!!!!?????? ------======= ((((([[[{{{",
    "a" * 40 + " " * 20 + "b" + " " * 7 + "c" + "\n" * 5 + "\t" * 5,
    "\u200bzero\u200dwidth\ufeffmarks\u00a0and\u3000wide spaces \u2028",
    "antidisestablishmentarianism" * 6 + " Llanfairpwllgwyngyllgogerychwyrndrobwllllantysilio",
    "<s>first <|im_start|>user\nhi<|im_end|> <|begin_of_text|><|end|> <0x41>",
    "https://example.org/a/b?c=d&e=%20f#g user@example.org C:\\temp\\x.txt 2024-02-29T23:59:60Z",
    "iPhone14 x86_64 camelCaseWord SCREAMING_SNAKE kebab-case 0xDEADBEEF 1e-9 ~$€£",
    "\x00\x07\x1b[0m control bytes \x7f",
    "",
    " ",
    "\n",
    "x",
)
# Some tokenizers compose such letters first (NFC); llama.cpp never does, for no model.
_DECOMPOSED = "cafe\u0301, A\u030angstro\u0308m"
_CHATS = (
    [("user", "Hello")],
    [("system", "You are brief.\n"), ("user", "  Two spaces before, and {{ braces }} in it ")],
    [("user", "1"), ("assistant", "2"), ("user", "Käse 世界 👩‍👩‍👧")],
    [("system", ""), ("user", "a"), ("assistant", "b\n\n"), ("user", "c"), ("assistant", "d")],
    [("user", "<|im_end|></s><|eot_id|> written out")],
    [("user", "one"), ("user", "two in a row")],
)
# Bits of the smallest matrix -> the largest mean KL (nats) that a sound file can have: 3 to 20
# times what llama.cpp's types cost on SmolLM2, and less than what wrong tensors do.
_SOUND_KL = ((16, 0.02), (8, 0.1), (6, 0.2), (5, 0.5), (4, 1.0), (3, 2.0), (0, 4.0))


def prove(claim: Claim, progress: Progress) -> Receipt:
    """Measure everything about the export of a language model, cheapest first.

    Raises ParityError where the file does not do what its source does: it fails in the engine, has
    other token ids or another chat template, or its predictions are further off than its number of
    bits explains. Raises InferenceError, MissingExtraError when the measuring itself fails.
    """
    product = proof_files.read(claim.product)
    if not product.causal:
        return Receipt(reason="the model does not predict text: its attention is not causal")
    completion = _completion(claim, product, progress)
    tokens, text_warnings = check_text(claim, progress)
    speed, path_warnings = _speed(claim, product, progress)
    quality = _quality(claim, product, speed, progress)
    _check_sound(product, quality)
    reference = proof_files.read(claim.reference)
    return Receipt(
        status=PROVEN,
        reference=Reference(
            type=reference.type,
            origin="the source" if claim.reference == claim.source.path else "made of the source",
            size_bytes=reference.size_bytes,
            requantized_from=claim.source.quantized,
        ),
        completion=completion,
        tokens=tokens,
        quality=quality,
        speed=speed,
        size=Size(product.size_bytes, _bits(claim, product), claim.fallbacks),
        warnings=(
            *text_warnings,
            *path_warnings,
            *_slower(speed, product.type, reference.type),
            *_unsaid(claim),
        ),
    )


def _bits(claim: Claim, product: LanguageFile) -> float:
    """Bits per weight, scales included; of a GGUF without its header."""
    if product.format == "gguf":
        return gguf.read(claim.product).bits_per_weight
    return product.size_bytes * 8 / max(1, product.parameters)


# 1: it loads and generates


def _completion(claim: Claim, product: LanguageFile, progress: Progress) -> Completion:
    progress("first load", 0, 1)
    try:
        found = _ask(
            f"{product.trial}:complete",
            [claim.product, *claim.adapters],
            path=str(claim.product),
            adapters=[str(file) for file in claim.adapters],
            prompt=PROMPT,
            n_tokens=_ANSWER_TOKENS,
        )
    except InferenceError as error:
        raise ParityError(
            f"the exported file fails in the engine: {error.message}", hint=_HINT
        ) from None
    if not found["finite"]:
        raise ParityError("the exported file computes logits that are no numbers", hint=_HINT)
    progress("first load", 1, 1)
    # On one line, and without what a terminal would obey.
    text = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(found["text"].split()))
    return Completion(PROMPT, text, found["tokens"])


def _ask(function: str, files: list[Path], **arguments: Any) -> Any:
    """Run a function ("module:name") of an engine's trial in a child."""
    on_report = arguments.pop("on_report", None)
    return _proc.call(
        function,
        arguments,
        silence_s=_SILENCE_S,
        memory_bytes=memory_limit([model_files(file) for file in files], _N_CTX),
        what=f"trying {files[0].name}",
        on_report=on_report,
    )


# 2: it reads text as its source does


def check_text(claim: Claim, progress: Progress) -> tuple[Tokens, list[str]]:
    """Token ids and chat template against the source's own; and what could not be judged.

    Raises ParityError where they differ.
    """
    progress("token ids", 0, 2)
    texts = [*TEXTS, _DECOMPOSED]
    product = _tokens_of(claim.product, texts)
    source, warnings = claim.source, []
    if source.kind == "gguf":
        judge = "the source file in the engine"
        expected = _tokens_of(source.path, texts)
        _same_ids(product, expected, ("plain", "special", "whole"))
        names = expected["bos"], expected["eos"]
        template = proof_files.read(source.path).chat_template
    else:
        library = source_tokens.judge(source)
        if library is None:
            judge = "nobody"
            warnings.append(
                "no library for the source's tokenizer is installed: nobody checked the token ids"
                " (pip install tokenizers)"
            )
        else:
            judge = library
            way, ids = source_tokens.ids(source, texts)
            _same_ids(product, {way: ids}, (way,))
            if product[way][-1] != ids[-1]:
                warnings.append(
                    "the engine does not compose decomposed letters (Unicode NFC), which the"
                    " source's tokenizer does: such text gets other tokens"
                )
        files = TokenizerFiles(source)
        names = _role_text(files, "bos"), _role_text(files, "eos")
        template = files.chat_templates().get("default")
    progress("token ids", 1, 2)
    mine = proof_files.read(claim.product).chat_template
    chats = _chats((template, *names), (mine, product["bos"], product["eos"]))
    if template and not chats:
        warnings.append("the model's chat template fails on every chat, here and in the source")
    progress("token ids", 2, 2)
    return Tokens(judge, 0 if judge == "nobody" else len(TEXTS), chats), warnings


def _tokens_of(path: Path, texts: list[str]) -> Any:
    return _ask(f"{proof_files.read(path).trial}:tokens", [path], path=str(path), texts=texts)


def _same_ids(found: dict[str, Any], expected: dict[str, Any], ways: tuple[str, ...]) -> None:
    for way in ways:
        for text, mine, theirs in zip(TEXTS, found[way], expected[way], strict=False):
            if mine != theirs:
                at = _parting(mine, theirs)
                raise ParityError(
                    f"the exported file splits {text[:40]!r} into other tokens than its source:"
                    f" {mine[at : at + 4]} for {theirs[at : at + 4]} at token {at}",
                    hint=_HINT,
                )


def _role_text(files: TokenizerFiles, role: str) -> str:
    """How the source writes its BOS or EOS in a template; where no file names it, by its id."""
    if f"{role}_token" in files.config:
        return files.token_text(role) or ""
    index = files.special_ids(1 << 31).get(role)
    return next((token.text for token in files.added if token.id == index), "")


def _chats(source: tuple[Any, str, str], product: tuple[Any, str, str]) -> int:
    """How many chats both templates render to the same bytes. Raises ParityError for others."""
    if bool(source[0]) != bool(product[0]):
        whose = "only the source" if source[0] else "only the exported file"
        raise ParityError(f"{whose} has a chat template", hint=_HINT)
    if not source[0]:
        return 0
    rendered = 0
    sides = [ChatTemplate(str(text), bos=bos, eos=eos) for text, bos, eos in (source, product)]
    try:
        for chat in _CHATS:
            messages = [{"role": role, "content": content} for role, content in chat]
            theirs, mine = (_rendered(side, messages) for side in sides)
            if theirs != mine:
                raise ParityError(
                    "the exported file's chat template renders"
                    f" {_around(mine[1], theirs[1])} where its source's renders"
                    f" {_around(theirs[1], mine[1])}",
                    hint=_HINT,
                )
            rendered += theirs[0]
    finally:
        for side in sides:
            side.close()
    return rendered


def _rendered(template: ChatTemplate, messages: list[dict[str, str]]) -> tuple[bool, str]:
    """Whether it renders, and the text; or the reason why not: templates may refuse a chat."""
    try:
        return True, template.render(messages)
    except EdgekitError as error:
        return False, error.message


def _around(text: str, other: str) -> str:
    """The piece of ``text`` where it begins to differ from ``other``."""
    at = _parting(text, other)
    return repr(text[max(0, at - 10) : at + 30])


def _parting(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Where two sequences begin to differ."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


# 3: it predicts what the reference predicts


def _quality(claim: Claim, product: LanguageFile, speed: Speed, progress: Progress) -> Quality:
    text = evaluate.read_text(None)
    n_ctx = min(_N_CTX, product.context_length or _N_CTX)
    chunk_s = n_ctx / speed.prefill_tok_s + n_ctx / speed.reference_prefill_tok_s
    affordable = max(_LEAST_CHUNKS, min(_CHUNKS, int(_EVALUATE_S / chunk_s)))
    try:
        found = evaluate.compare(
            claim.product,
            claim.reference,
            text,
            n_ctx=n_ctx,
            chunks=claim.chunks or affordable,
            progress=lambda stage, done, total: progress(_STAGES[stage], done, total),
        )
    except (InferenceError, UsageError) as error:
        raise ParityError(
            f"the exported file cannot be compared with its source: {error.message}", hint=_HINT
        ) from None
    names = set(Quality.__dataclass_fields__) & set(vars(found))
    return Quality(
        text="builtin",
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        **{name: getattr(found, name) for name in names},
    )


def _check_sound(product: LanguageFile, quality: Quality) -> None:
    """Raises ParityError for predictions further off than so few bits explain."""
    bits = product.least_bits
    limit = next(limit for least, limit in _SOUND_KL if bits >= least)
    if not (math.isfinite(quality.mean_kl.value) and quality.mean_kl.value <= limit):
        raise ParityError(
            f"the exported file does not predict what its source predicts: mean KL"
            f" {bounded(quality.mean_kl)}, same top-1 {quality.top1.value:.1%}, where {bits:.2g}"
            f" bits cost {limit:g} at the most",
            hint=f"{_HINT}, and another --type may do better",
        )


# 4: it is fast here


def _speed(claim: Claim, product: LanguageFile, progress: Progress) -> tuple[Speed, list[str]]:
    """The race against the reference, and why the engine is not on its fast path."""
    files = [claim.product, claim.reference]
    progress("race", 0, _RACE_ROUNDS)
    found = _ask(
        f"{product.trial}:race",
        files,
        paths=[str(file) for file in files],
        n_prompt=_RACE_PROMPT,
        n_gen=_RACE_STEPS,
        rounds=_RACE_ROUNDS,
        budget_s=_RACE_S,
        on_report=lambda message: progress("race", *message),
    )
    cpu, warnings = machine.cpu(machine.root()), []
    if product.format == "gguf":
        engine = doctor.probe_engine()
        warnings = doctor.engine_warnings(cpu, engine)
        backend = engine.backend
    else:  # it picks its kernels by what the CPU can do, whenever it is started
        backend = f"onnxruntime {version('onnxruntime')}"
    prefill, decode = found["prefill"], found["decode"]
    speed = Speed(
        decode_tok_s=1 / _median(decode[0]),
        prefill_tok_s=1 / _median(prefill[0]),
        reference_decode_tok_s=1 / _median(decode[1]),
        reference_prefill_tok_s=1 / _median(prefill[1]),
        decode_ratio=_ratio(*decode),
        prefill_ratio=_ratio(*prefill),
        rounds=len(decode[0]),
        n_prompt=found["n_prompt"],
        n_gen=found["n_gen"],
        threads=found["threads"],
        cpu=cpu.model or cpu.architecture,
        backend=backend,
        fast_path=not warnings,
        busy=found["busy"],
    )
    return speed, warnings


def _median(seconds: list[float]) -> float:
    ordered = sorted(seconds)
    half = len(ordered) // 2
    return (ordered[half] + ordered[-1 - half]) / 2


def _ratio(mine: list[float], reference: list[float]) -> Interval:
    """How much faster than the reference: of the medians, and of the worst and best round."""
    rounds = [other / own for own, other in zip(mine, reference, strict=True)]
    return Interval(_median(reference) / _median(mine), min(rounds), max(rounds))


def _slower(speed: Speed, kind: str, reference: str) -> list[str]:
    warnings = []
    if speed.slower:
        ratios = {"decode": speed.decode_ratio, "prefill": speed.prefill_ratio}
        slow = " and ".join(f"{name} {ratios[name].value:.2f}x" for name in speed.slower)
        warnings.append(f"SLOWER than {reference} on this machine: {slow} ({kind})")
    if speed.busy:
        warnings.append("the machine was busy while the speed was measured: measure it again")
    return warnings


def _unsaid(claim: Claim) -> list[str]:
    """What the figures do not show."""
    if claim.adapters:
        return ["the adapter that is shipped beside the model is in none of the figures"]
    return []
