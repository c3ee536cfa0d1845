"""How well a model predicts a text: perplexity, and its distance from a reference model.

Knows logits, chunks and statistics; never an engine (``scorer``) or a task with answers.

Chunks, BOS and scored positions are those of llama.cpp's perplexity program, so that the figures
can be compared: the text is cut into chunks of n_ctx tokens, each begins with BOS where the model
wants one, and the second half of each is scored, where every token has half a chunk before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from edgekit import _proc, intervals, plot
from edgekit.errors import InferenceError, UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.intervals import Interval
from edgekit.scorer import ModelFiles, Scorer, memory_limit, model_files

MIN_N_CTX = 8
_MAX_TEXT_BYTES = 64 << 20
# No chunk of text takes this long, even on the slowest board.
_SILENCE_S = 1800
# Floats of a buffer of logits: few enough that all buffers stay in the processor's cache.
_CACHED_FLOATS = 1 << 17


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (nats) of ``tokens`` scored tokens.

    ``tok_s`` counts every token of the text that was read, scored or not.
    """

    value: Interval
    tokens: int
    chunks: int
    n_ctx: int
    tok_s: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"value": self.value.to_dict()}


@dataclass(frozen=True)
class Divergence:
    """How far a model's next-token distributions are from a reference's, over ``tokens`` tokens.

    KL is D(reference || model) in nats; ``top1`` is the share of tokens where both models have the
    same favourite; ``perplexity_ratio`` is the model's perplexity by the reference's. ``token_kl``
    holds the KL of every token, in the order of the text. ``tok_s`` counts every token of the text
    that both models read.
    """

    tokens: int
    chunks: int
    n_ctx: int
    mean_kl: Interval
    median_kl: float
    p90_kl: float
    p99_kl: float
    p999_kl: float
    max_kl: float
    top1: Interval
    perplexity: float
    reference_perplexity: float
    perplexity_ratio: Interval
    tok_s: float
    token_kl: tuple[float, ...] = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the KL of every single token."""
        body = {name: value for name, value in vars(self).items() if name != "token_kl"}
        return {
            name: value.to_dict() if isinstance(value, Interval) else value
            for name, value in body.items()
        }


def perplexity(
    model: str | Path,
    text: str,
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Perplexity:
    """The perplexity of an artifact or a GGUF file over the first ``chunks`` chunks of ``text``.

    Its 95% interval comes from the means of the chunks, with Student's t: tokens of one chunk hang
    together, so taking each for an independent measurement would promise too much. (With a single
    chunk there is nothing else: then the interval comes from its tokens, and is too narrow.)
    Raises UsageError (text shorter than a chunk, n_ctx above the trained one), ArtifactError,
    LoadError, InferenceError, EngineCrashedError.
    """
    seconds, rows = _score([model_files(model)], text, n_ctx, chunks, threads, progress)
    nll = [row["nll"][0] for row in rows]
    return Perplexity(
        value=_exp(_mean(nll)),
        tokens=sum(map(len, nll)),
        chunks=len(nll),
        n_ctx=n_ctx,
        tok_s=len(nll) * n_ctx / seconds,
    )


def compare(
    model: str | Path,
    reference: str | Path,
    text: str,
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> Divergence:
    """How far ``model`` is from ``reference`` over the first ``chunks`` chunks of ``text``.

    Both run side by side in one child process, and no logits are kept: a few numbers per token
    are. Intervals are at 95%: those of the mean KL and of the perplexity ratio come from the means
    of the chunks, as in ``perplexity``; that of ``top1`` is Wilson's over the tokens, and a little
    too narrow for the same reason. Raises UsageError also when the two do not share a vocabulary or
    split the text differently; otherwise as ``perplexity``.
    """
    files = [model_files(model), model_files(reference)]
    seconds, rows = _score(files, text, n_ctx, chunks, threads, progress)
    kl = [row["kl"] for row in rows]
    nll, reference_nll = ([row["nll"][side] for row in rows] for side in (0, 1))
    token_kl = tuple(value for chunk in kl for value in chunk)
    ordered = sorted(token_kl)
    log_ratios = [
        [mine - other for mine, other in zip(*pair, strict=True)]
        for pair in zip(nll, reference_nll, strict=True)
    ]
    return Divergence(
        tokens=len(token_kl),
        chunks=len(rows),
        n_ctx=n_ctx,
        mean_kl=_mean(kl),
        median_kl=_percentile(ordered, 0.5),
        p90_kl=_percentile(ordered, 0.9),
        p99_kl=_percentile(ordered, 0.99),
        p999_kl=_percentile(ordered, 0.999),
        max_kl=ordered[-1],
        top1=intervals.proportion(sum(row["same_top1"] for row in rows), len(token_kl)),
        perplexity=_exp(_mean(nll)).value,
        reference_perplexity=_exp(_mean(reference_nll)).value,
        perplexity_ratio=_exp(_mean(log_ratios)),
        tok_s=len(rows) * n_ctx / seconds,
        token_kl=token_kl,
    )


def read_text(path: Path | None) -> str:
    """A UTF-8 text of at most 64 MiB; None: edgekit's own held-out text. Raises UsageError."""
    if path is None:
        own = resources.files("edgekit.exporters").joinpath("held_out.txt")
        return own.read_text("utf-8")
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read the text {path}: {error.strerror}") from None
    if len(raw) > _MAX_TEXT_BYTES:
        raise UsageError(f"the text {path} is larger than 64 MiB")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"the text {path} is not UTF-8") from None


def draw(found: Divergence, path: Path) -> None:
    """Plot the share of tokens below each KL divergence, to a .png or .svg file."""
    ordered = sorted(found.token_kl)
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    with plot.figure(path) as figure:
        axes = figure.add_subplot()
        # Zero has no place on a logarithmic axis, and less than this is rounding.
        axes.plot([max(kl, 1e-7) for kl in ordered], shares)
        for name, value in (
            ("median", found.median_kl),
            ("mean", found.mean_kl.value),
            ("p99", found.p99_kl),
        ):
            axes.axvline(max(value, 1e-7), color="#888888", linewidth=0.8, linestyle="--")
            axes.annotate(f" {name} {value:.3g}", (max(value, 1e-7), 0.02), rotation=90, fontsize=8)
        axes.set_xscale("log")
        axes.set_ylim(0, 1)
        axes.set_xlabel("KL divergence of a token from the reference (nats)")
        axes.set_ylabel("share of tokens with at most that")


# Statistics over chunks


def _mean(chunks: Sequence[Sequence[float]]) -> Interval:
    """The mean of all values, every chunk having as many; see ``perplexity`` on its interval."""
    if len(chunks) == 1:
        return intervals.mean(chunks[0])
    return intervals.mean([fmean(chunk) for chunk in chunks])


def _exp(found: Interval) -> Interval:
    return Interval(*(math.exp(x) if x < 700 else math.inf for x in vars(found).values()))


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Between two neighbours the values are taken to lie on a line."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


# The child process


def _score(
    models: list[ModelFiles],
    text: str,
    n_ctx: int,
    chunks: int | None,
    threads: int | None,
    progress: Progress,
) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of work, and what ``_chunk_scores`` says of each chunk."""
    if n_ctx < MIN_N_CTX:
        raise UsageError(f"n_ctx must be at least {MIN_N_CTX}, not {n_ctx}")
    if chunks is not None and chunks < 1:
        raise UsageError(f"chunks must be at least 1, not {chunks}")
    rows: list[dict[str, Any]] = []

    def on_report(message: tuple[int, dict[str, Any] | None]) -> None:
        total, row = message
        if row is None:
            progress("load", 1, 1)
        else:
            rows.append(row)
        progress("evaluate", len(rows), total)

    progress("load", 0, 1)
    seconds = _proc.call(
        "edgekit.evaluate:_score_in_child",
        {
            "models": [vars(files) for files in models],
            "text": text,
            "n_ctx": n_ctx,
            "chunks": chunks,
            "threads": threads,
        },
        silence_s=_SILENCE_S,
        memory_bytes=memory_limit(models, n_ctx),
        what=f"evaluating {models[0].path}",
        on_report=on_report,
    )
    return seconds, rows


def _score_in_child(
    models: list[dict[str, Any]], text: str, n_ctx: int, chunks: int | None, threads: int | None
) -> float:
    with ExitStack() as opened:
        scorers = [
            opened.enter_context(ModelFiles(**files).open(n_ctx=n_ctx, threads=threads))
            for files in models
        ]
        tokens = _tokens(scorers, text)
        total = len(tokens) // n_ctx
        if total == 0:
            raise UsageError(
                f"the text has {len(tokens)} tokens, less than one chunk of {n_ctx}",
                hint="give a longer text, or a smaller n_ctx",
            )
        total = min(total, chunks or total)
        _proc.report([total, None])
        buffers = [_Rows(scorer.n_vocab) for scorer in scorers]
        started = time.perf_counter()
        for i in range(total):
            chunk = tokens[i * n_ctx : (i + 1) * n_ctx]
            if scorers[0].bos is not None:
                chunk[0] = scorers[0].bos
            _proc.report([total, _chunk_scores(scorers, buffers, chunk)])
        return time.perf_counter() - started


def _tokens(scorers: Sequence[Scorer], text: str) -> list[int]:
    """The text's tokens, which must be the same to all models; BOS first, where they want one."""
    own, *others = scorers
    tokens = own.tokenize(text)
    for other in others:
        why = None
        if own.n_vocab != other.n_vocab:
            why = f"one knows {own.n_vocab} tokens, the other {other.n_vocab}"
        elif own.bos != other.bos:
            why = "they begin a text differently"
        elif tokens != other.tokenize(text):
            why = "they split the text into different tokens"
        if why:
            raise UsageError(
                f"the two models cannot be compared: {why}",
                hint="the reference must have the same tokenizer; take the model's own float file",
            )
    return tokens if own.bos is None else [own.bos, *tokens]


def _chunk_scores(
    scorers: Sequence[Scorer], buffers: Sequence[_Rows], chunk: Sequence[int]
) -> dict[str, Any]:
    """Of a chunk's second half: nats per token for each model, KL per token, equal favourites."""
    import numpy as np

    at = len(chunk) // 2
    nll: list[list[float]] = [[] for _ in scorers]
    kl: list[float] = []
    same = 0
    for blocks in zip(*(scorer.blocks(chunk, at) for scorer in scorers), strict=True):
        targets = np.array(chunk[at + 1 : at + 1 + len(blocks[0])])
        at += len(blocks[0])
        for part in buffers[0].parts(len(targets)):
            wanted = targets[part]
            for side, (rows, block) in enumerate(zip(buffers, blocks, strict=True)):
                rows.take(block[part])
                nll[side] += rows.nll(wanted).tolist()
            if len(buffers) == 2:
                same += int(np.count_nonzero(buffers[0].best == buffers[1].best))
                kl += buffers[0].kl_from(buffers[1]).tolist()
    if not all(math.isfinite(value) for values in (*nll, kl) for value in values):
        raise InferenceError("the model gives logits that are no finite numbers")
    return {"nll": nll, "kl": kl, "same_top1": same}


class _Rows:
    """A few rows of logits at a time, with what both figures need of their softmax.

    Every pass over a row is float32 in buffers that stay in the cache; sums are float64.
    """

    def __init__(self, n_vocab: int) -> None:
        import numpy as np

        self._size = max(1, _CACHED_FLOATS // n_vocab)
        self._shifted = np.empty((self._size, n_vocab), np.float32)
        self._exp = np.empty((self._size, n_vocab), np.float32)

    def parts(self, count: int) -> Iterator[slice]:
        """``count`` rows in slices that fit the buffers."""
        for start in range(0, count, self._size):
            yield slice(start, min(start + self._size, count))

    def take(self, logits: Any) -> None:
        """Logits minus their row's largest, the exponentials of that, and the log of their sum."""
        import numpy as np

        count = len(logits)
        self.shifted, self.exp = self._shifted[:count], self._exp[:count]
        self.best = logits.argmax(axis=1)
        np.subtract(logits, logits[np.arange(count), self.best][:, None], out=self.shifted)
        np.exp(self.shifted, out=self.exp)
        self.sums = self.exp.sum(axis=1, dtype=np.float64)
        self.log_sums = np.log(self.sums)

    def nll(self, targets: Any) -> Any:
        """-ln p of one token per row, float64."""
        import numpy as np

        return self.log_sums - self.shifted[np.arange(len(targets)), targets]

    def kl_from(self, reference: _Rows) -> Any:
        """D(reference || self) per row in nats, float64; spoils the buffers of ``self``.

        sum p_ref (ln p_ref - ln p), with both logarithms as shifted logits minus a log of a sum.
        """
        import numpy as np

        np.subtract(reference.shifted, self.shifted, out=self.shifted)
        np.multiply(self.shifted, reference.exp, out=self.shifted)
        expected = self.shifted.sum(axis=1, dtype=np.float64) / reference.sums
        # A divergence is never negative, but its rounding error may be.
        return np.maximum(expected + self.log_sums - reference.log_sums, 0.0)
