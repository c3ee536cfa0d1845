"""The table behind ``--bits``: size, quality and speed of GGUF types on a fair float reference.

Every file is made by edgekit, with and without its importance matrix; llama-perplexity compares it
with the float model on held-out text, llama-bench times it against F16. ``--wide`` measures on
SmolLM2 with rows of 768, which every type can hold; for most, its own rows of 576 are no multiple
of a block. A row is on the front when no file that is as small or smaller has a lower divergence.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import peers
import reference
import wide

import edgekit
from edgekit import _proc, quant
from edgekit.cli.ending import ending
from edgekit.errors import EdgekitError, UsageError
from edgekit.exporters import imatrix

TYPES = (
    *("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1"),
    *("Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XXS"),
    *("Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XXS"),
)
TEXT_PACKAGE = "anarchism"
_SLICE_BYTES = 16_000  # more than 4 chunks of 512 tokens
_FIGURES = {
    "mean_kl": r"Mean +KLD: +(\S+)",
    "p99_kl": r"99\.0% +KLD: +(\S+)",
    "same_top1_percent": r"Same top p: +(\S+)",
    "perplexity": r"Mean PPL\(Q\) +: +(\S+)",
}


@dataclass(frozen=True)
class Row:
    """One file: its type, the chunks of its importance matrix (0: none), and its quality."""

    type: str
    calibration_chunks: int
    size_bytes: int
    bits_per_weight: float
    mean_kl: float
    p99_kl: float
    same_top1_percent: float
    perplexity: float

    def beats(self, other: Row) -> bool:
        """At least as good in size and in KL divergence, and better in one of them."""
        mine, others = (self.size_bytes, self.mean_kl), (other.size_bytes, other.mean_kl)
        return mine != others and mine[0] <= others[0] and mine[1] <= others[1]


@dataclass(frozen=True)
class Truth:
    """The float model, and llama-perplexity's record of its logits over the held-out text."""

    model: Path
    logits: Path

    def compare(self, tools: peers.Tools, model: Path, threads: int) -> dict[str, float]:
        """KL divergence (nats), agreement of the first choice (%) and perplexity of ``model``."""
        argv = [tools.program("llama-perplexity"), "-m", model, "-t", threads, "--kl-divergence"]
        text = measure.run([*argv, "--kl-divergence-base", self.logits]).stdout
        found = {name: re.search(pattern, text) for name, pattern in _FIGURES.items()}
        if missing := [name for name, match in found.items() if match is None]:
            raise EdgekitError(f"llama-perplexity printed no {missing[0]}: is it another version?")
        return {name: float(match[1]) for name, match in found.items() if match}


def record_truth(tools: peers.Tools, model: Path, text: bytes, chunks: int, threads: int) -> Truth:
    """Record the reference's logits beside it, once per text and chunk count."""
    digest = hashlib.sha256(text).hexdigest()[:12]
    path = model.with_name(f"{model.stem}-logits-{digest}-{chunks}.bin")
    if not path.is_file():
        measure.say(f"recording the float model's logits over {chunks} chunks")
        held_out = model.parent / f"held-out-{digest}.txt"
        held_out.write_bytes(text)
        unfinished = path.with_suffix(".partial")
        argv = [tools.program("llama-perplexity"), "-m", model, "-f", held_out, "-t", threads]
        measure.run([*argv, "--chunks", chunks, "--kl-divergence-base", unfinished])
        unfinished.rename(path)
    # The file begins with 8 letters, then n_ctx, the vocabulary's size and the chunks (int32).
    recorded = int(np.fromfile(path, np.int32, count=3, offset=8)[2])
    if recorded < chunks:
        raise UsageError(f"the held-out text has only {recorded} chunks of 512 tokens")
    return Truth(model, path)


def held_out_text(file: Path | None, chunks: int) -> bytes:
    """The text of ``file``, or slices from all over the Debian package ``anarchism``.

    Raises UsageError when there is neither.
    """
    if file is not None:
        try:
            return file.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read {file}: {error.strerror}") from None
    try:
        names = _proc.run(["dpkg", "-L", TEXT_PACKAGE], timeout_s=30).splitlines()
    except EdgekitError:
        names = []
    sections = sorted(Path(n) for n in names if re.search(r"/markdown/sec\w+\.md(\.gz)?$", n))
    if not sections:
        raise UsageError(
            "there is no held-out text to measure on",
            hint=f"apt-get install {TEXT_PACKAGE}, or give --text FILE",
        )
    slices = min(len(sections), -(-chunks // 4) + 1)
    chosen = [sections[i * len(sections) // slices] for i in range(slices)]
    return b"\n".join(_slice(path) for path in chosen)


def _slice(path: Path) -> bytes:
    """Whole lines from the beginning of a text, without its first kilobyte of headings."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return data[1024 : 1024 + _SLICE_BYTES].partition(b"\n")[2].rpartition(b"\n")[0]


def variants(types: Sequence[str], calibrations: Sequence[int]) -> Iterator[tuple[str, int]]:
    """(type, calibration chunks) of every file to make; 0 chunks: no importance matrix."""
    for kind in types:
        if not quant.wants_imatrix(kind):
            yield kind, 0
            continue
        for chunks in calibrations:
            if chunks or kind not in quant.NEEDS_IMATRIX:
                yield kind, chunks


def make_row(
    tools: peers.Tools, truth: Truth, kind: str, chunks: int, out: Path, threads: int
) -> Row:
    """Export one file to the artifact ``out`` and measure its quality."""
    artifact = edgekit.export(
        truth.model,
        out=out,
        type=kind,
        calibration="builtin" if chunks else "none",
        chunks=chunks or None,
        receipt=False,
    )
    return Row(
        type=kind,
        calibration_chunks=chunks,
        size_bytes=artifact.model_path.stat().st_size,
        bits_per_weight=artifact.manifest.details["bits_per_weight"],
        **truth.compare(tools, artifact.model_path, threads),
    )


def speeds(
    tools: peers.Tools,
    models: dict[str, Path],
    baseline: Path,
    reps: int,
    options: Sequence[str | int],
) -> dict[str, tuple[measure.Spread, measure.Spread]]:
    """type -> speed of (decode, prefill) relative to the baseline's, in turn."""
    taken: dict[str, tuple[list[float], list[float]]] = {
        kind: ([], []) for kind in ("baseline", *models)
    }

    def one(kind: str, model: Path) -> None:
        for row in tools.bench(model, *options):
            taken[kind][0 if row["n_gen"] else 1].append(row["avg_ts"])

    measure.say("speed of every type")
    sides = {"baseline": baseline, **models}
    measure.in_turn(reps, *(partial(one, kind, model) for kind, model in sides.items()))
    base = taken["baseline"]
    return {
        kind: (
            measure.ratios(taken[kind][0], base[0]),
            measure.ratios(taken[kind][1], base[1]),
        )
        for kind in models
    }


def _arguments() -> argparse.Namespace:
    parser = measure.parser(__doc__, reps=5)
    parser.add_argument("--chunks", type=int, default=100, help="held-out chunks of 512 tokens")
    parser.add_argument("--text", type=Path, metavar="FILE", help="held-out text")
    parser.add_argument("--types", default=",".join(TYPES), metavar="A,B")
    parser.add_argument(
        "--calibration-chunks",
        type=_numbers,
        default=(0, imatrix.DEFAULT_CHUNKS),
        metavar="N,M",
        help="sizes of the importance matrix's text; 0: without one",
    )
    parser.add_argument("--wide", action="store_true", help="measure on rows of 768")
    parser.add_argument("--seed", type=int, default=1, help="of the reference's scales")
    return parser.parse_args()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def main() -> None:
    """Print the table."""
    arguments = _arguments()
    figures: dict[str, Any] = {"machine": measure.describe_machine()}
    scratch, threads = measure.scratch(arguments), arguments.threads
    chunks, reps = arguments.chunks, arguments.reps
    types = tuple(quant.gguf_type(name) for name in arguments.types.split(","))
    calibrations = arguments.calibration_chunks
    bench = ("-p", 512, "-n", 64, "-t", threads, "-fa", 1, "-r", 1)
    if arguments.quick:
        chunks, reps, types, calibrations = 2, 1, ("Q8_0", "Q4_K_M"), (0, 2)
        bench = ("-p", 16, "-n", 4, "-t", threads, "-fa", 1, "-r", 1)
    text = held_out_text(arguments.text, chunks)
    tools = peers.find_tools(arguments.tools)
    model = (wide if arguments.wide else reference).make(scratch, arguments.seed)
    truth = record_truth(tools, model, text, chunks, threads)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        models: dict[str, Path] = {}
        for kind, calibration in variants(types, calibrations):
            out = Path(folder) / kind  # the last variant stays, for the speeds
            rows.append(make_row(tools, truth, kind, calibration, out, threads))
            models[kind] = out / "model.gguf"
            measure.say(str(rows[-1]))
        baseline = edgekit.export(model, out=Path(folder) / "F16", type="F16", receipt=False)
        speed = speeds(tools, models, baseline.model_path, reps, bench)
    rows.sort(key=lambda row: (-row.size_bytes, row.mean_kl))
    measure.table(
        f"Types on the float reference, {chunks} held-out chunks of 512 tokens; speeds are"
        f" multiples of F16's, medians of {reps}",
        [
            *("type", "imatrix chunks", "bytes", "bits/weight", "mean KL", "p99 KL"),
            *("same top-1", "perplexity", "decode", "prefill", "front"),
        ],
        [
            [
                row.type,
                row.calibration_chunks or "-",
                f"{row.size_bytes:,}",
                f"{row.bits_per_weight:.2f}",
                f"{row.mean_kl:.4f}",
                f"{row.p99_kl:.3f}",
                f"{row.same_top1_percent:.1f}%",
                f"{row.perplexity:.2f}",
                *speed[row.type],
                "" if any(other.beats(row) for other in rows) else "yes",
            ]
            for row in rows
        ],
    )
    measure.finish(arguments, figures | {"rows": rows, "speed": speed})


if __name__ == "__main__":
    with ending():
        main()
