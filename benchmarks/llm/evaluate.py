"""``edgekit eval`` against llama-perplexity: the same figures, and how fast they come.

Both sides read the same files and the same chunks with the same threads, as whole commands: start,
load and statistics are in the time. llama-perplexity needs two runs for a KL divergence, one that
records the reference's logits and one that reads them; the record serves other files of that
reference again, so the second run alone is shown as well.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
import peers
import presets

from edgekit.cli.ending import ending
from edgekit.errors import EdgekitError

REFERENCE = "F16"
TYPES = ("Q4_0", "Q4_K_M")
N_CTX = 512
# More than any ordinary text has: nobody's time to split the rest into tokens shall count.
_TOKEN_BYTES = 8
TARGET_RATIO = 0.7
TARGET_DIFFERENCE = 0.01
# What llama-perplexity prints -> how to find the same in the JSON of `edgekit eval`.
_FIGURES: dict[str, tuple[str, Callable[[Any], float]]] = {
    "perplexity": (r"Mean PPL\(Q\) +", lambda body: body["perplexity"]),
    "reference perplexity": (r"Mean PPL\(base\) +", lambda body: body["reference_perplexity"]),
    "perplexity ratio": (
        r"Mean PPL\(Q\)/PPL\(base\) +",
        lambda body: body["perplexity_ratio"]["value"],
    ),
    "mean KL": ("Mean +KLD", lambda body: body["mean_kl"]["value"]),
    "median KL": ("Median +KLD", lambda body: body["median_kl"]),
    "p90 KL": (r"90\.0% +KLD", lambda body: body["p90_kl"]),
    "p99 KL": (r"99\.0% +KLD", lambda body: body["p99_kl"]),
    "p99.9 KL": (r"99\.9% +KLD", lambda body: body["p999_kl"]),
    "same top-1, %": ("Same top p", lambda body: 100 * body["top1"]["value"]),
}


@dataclass
class Times:
    """Seconds of whole commands, a figure per repetition."""

    alone: list[float] = field(default_factory=list)
    peer_alone: list[float] = field(default_factory=list)
    against: list[float] = field(default_factory=list)
    peer_record: list[float] = field(default_factory=list)
    peer_compare: list[float] = field(default_factory=list)

    def ratios(self) -> dict[str, measure.Spread]:
        """How many times as fast as llama-perplexity edgekit is."""
        both = [x + y for x, y in zip(self.peer_record, self.peer_compare, strict=True)]
        return {
            "perplexity": measure.ratios(self.peer_alone, self.alone),
            "KL, both its runs": measure.ratios(both, self.against),
            "KL, its second run alone": measure.ratios(self.peer_compare, self.against),
        }


@dataclass(frozen=True)
class Sides:
    """Both programs over one text."""

    program: Path
    reference: Path
    text: Path
    record: Path
    chunks: int
    threads: int

    def ours(self, model: Path, times: Times) -> dict[str, Any]:
        """The JSON of a comparison; the times of it, and of a perplexity alone."""
        sizes = ("--ctx", N_CTX, "--chunks", self.chunks, "--threads", self.threads)
        options: list[str | Path] = ["--json", "--text", self.text, *map(str, sizes)]
        alone = measure.run(peers.edgekit("eval", model, *options))
        against = measure.run(peers.edgekit("eval", model, "--against", self.reference, *options))
        times.alone.append(alone.wall_s)
        times.against.append(against.wall_s)
        body: dict[str, Any] = json.loads(against.stdout)
        return body

    def theirs(self, model: Path, times: Times) -> dict[str, float]:
        """The figures of its report; the times of all its runs."""
        text = ["-f", self.text, "-c", N_CTX, "--chunks", self.chunks]
        record = ["--kl-divergence-base", self.record]
        times.peer_alone.append(self._run(model, *text).wall_s)
        times.peer_record.append(self._run(self.reference, *text, *record).wall_s)
        compared = self._run(model, "--kl-divergence", *record)
        times.peer_compare.append(compared.wall_s)
        found = {}
        for name, (pattern, _) in _FIGURES.items():
            match = re.search(rf"^{pattern}: +([\d.]+)", compared.stdout, flags=re.MULTILINE)
            if match is None:
                raise EdgekitError(f"llama-perplexity printed no {name}: is it another version?")
            found[name] = float(match[1])
        return found

    def _run(self, model: Path, *options: object) -> measure.Ran:
        return measure.run([self.program, "-m", model, "-t", self.threads, *options])


def compare(sides: Sides, model: Path, reps: int) -> tuple[Times, dict[str, tuple[float, float]]]:
    """Times in turn, and name -> (our figure, its figure)."""
    times = Times()
    ours: dict[str, Any] = {}
    theirs: dict[str, float] = {}
    measure.in_turn(
        reps,
        lambda: ours.update(sides.ours(model, times)),
        lambda: theirs.update(sides.theirs(model, times)),
    )
    return times, {name: (find(ours), theirs[name]) for name, (_, find) in _FIGURES.items()}


def _speed_rows(kind: str, times: Times, tokens: int) -> list[list[object]]:
    seconds = {
        "perplexity": times.alone,
        "KL, both its runs": times.against,
        "KL, its second run alone": times.against,
    }
    rows: list[list[object]] = []
    for work, ratio in times.ratios().items():
        speed = tokens / measure.spread(seconds[work]).median
        promised = not work.endswith("alone")
        met = ("yes" if ratio.median >= TARGET_RATIO else "no") if promised else "-"
        rows.append([kind, work, f"{speed:.0f}", ratio, met])
    return rows


def _figure_rows(kind: str, figures: dict[str, tuple[float, float]]) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, (ours, theirs) in figures.items():
        off = ours / theirs - 1
        met = "yes" if abs(off) <= TARGET_DIFFERENCE else "no"
        rows.append([kind, name, f"{ours:.6g}", f"{theirs:.6g}", f"{off:+.2%}", met])
    return rows


def main() -> None:
    """Print both tables."""
    parser = measure.parser(__doc__, reps=5)
    parser.add_argument("--chunks", type=int, default=20, help=f"chunks of {N_CTX} tokens")
    parser.add_argument("--text", type=Path, metavar="FILE", help="held-out text")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": measure.describe_machine()}
    quick = arguments.quick
    chunks, reps = (2, 1) if quick else (arguments.chunks, arguments.reps)
    scratch = measure.scratch(arguments)
    tools = peers.find_tools(arguments.tools)
    whole = presets.held_out_text(arguments.text, chunks)
    text = whole[: chunks * N_CTX * _TOKEN_BYTES].decode("utf-8", "ignore")
    models = {
        kind: peers.quantized(tools, scratch, kind)
        for kind in (REFERENCE, *(TYPES[:1] if quick else TYPES))
    }
    reference = models.pop(REFERENCE)
    found: dict[str, tuple[Times, dict[str, tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        held_out = Path(folder) / "held-out.txt"
        held_out.write_text(text, "utf-8")
        sides = Sides(
            tools.program("llama-perplexity"),
            *(reference, held_out, Path(folder) / "logits"),
            chunks,
            arguments.threads,
        )
        for kind, model in models.items():
            measure.say(f"evaluating {kind}")
            found[kind] = compare(sides, model, reps)
    measure.table(
        f"{chunks} chunks of {N_CTX} tokens, -t {arguments.threads}, whole commands (median and"
        f" range of {reps}); text tokens of edgekit per second, and how many times as fast it is",
        ["type", "work", "tok/s", "edgekit / llama-perplexity", f"at least {TARGET_RATIO}"],
        [
            row
            for kind, (times, _) in found.items()
            for row in _speed_rows(kind, times, chunks * N_CTX)
        ],
    )
    measure.table(
        f"The figures, against {REFERENCE}",
        ["type", "figure", "edgekit", "llama-perplexity", "off by", "within 1%"],
        [row for kind, (_, both) in found.items() for row in _figure_rows(kind, both)],
    )
    rows = {
        kind: {"seconds": times, "ratios": times.ratios(), "figures": both}
        for kind, (times, both) in found.items()
    }
    measure.finish(arguments, figures | {"rows": rows})


if __name__ == "__main__":
    with ending():
        main()
