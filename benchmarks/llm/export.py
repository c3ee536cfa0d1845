"""``edgekit export`` against llama.cpp's conversion script, quantizer and llama-imatrix.

Three tables: what HF folder -> Q4_K_M costs on both sides (no importance matrix); whether the files
are the same, tensor by tensor and key by key; what quantizing with an importance matrix costs, and
how equal the two matrices are. Sides run in turn, in fresh processes; memory is that of the whole
process tree.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import measure
import numpy as np
import peers

from edgekit.cli.ending import ending
from edgekit.errors import EdgekitError
from edgekit.exporters import imatrix
from edgekit.formats import gguf

TYPE = "Q4_K_M"
_QUICK_TEXT_BYTES = 10_000
_ALL_CHUNKS = "10000"  # more than the text has, so both sides take all of it
# The one part of general.* that decides how the engine reads a file; the rest describes it.
_READ_BY_ENGINE = ("general.architecture", "general.alignment")


@dataclass
class Costs:
    """Of one side, a figure per repetition."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    rss_bytes: list[float] = field(default_factory=list)

    def add(self, *steps: measure.Ran) -> None:
        """One repetition: steps that ran one after another."""
        self.wall_s.append(sum(step.wall_s for step in steps))
        self.cpu_s.append(sum(step.cpu_s for step in steps))
        self.rss_bytes.append(max(step.rss_bytes for step in steps))


class Conversion:
    """HF folder -> GGUF, by both sides, into one work folder."""

    def __init__(self, tools: peers.Tools, model: Path, work: Path, threads: int) -> None:
        self._tools = tools
        self._model = model
        self._work = work
        self._threads = threads
        self._script, self._env = peers.find_converter()

    def ours(self, kind: str, model: Path | None = None) -> measure.Ran:
        """``edgekit export`` as a user types it, of the folder or of another ``model``."""
        options = ("--type", kind, "--calibration", "none", "--no-receipt")
        argv = peers.edgekit("export", model or self._model, *options)
        return measure.run([*argv, "--out", self._work / f"ours-{kind}"], memory=True)

    def theirs(self) -> tuple[measure.Ran, measure.Ran]:
        """The script, to F16, then the quantizer."""
        float_file, out = self.their_file("F16"), self.their_file(TYPE)
        argv = [sys.executable, self._script, self._model, "--outfile", float_file]
        converted = measure.run([*argv, "--outtype", "f16"], env=self._env, memory=True)
        quantize = [self._tools.program("llama-quantize"), float_file, out, TYPE, self._threads]
        return converted, measure.run(quantize, memory=True)

    def our_file(self, kind: str) -> Path:
        return self._work / f"ours-{kind}" / "model.gguf"

    def their_file(self, kind: str) -> Path:
        return self._work / f"theirs-{kind}.gguf"


def same_file(ours: Path, theirs: Path) -> dict[str, Any]:
    """Where two GGUF files differ: tensors (bit for bit), keys the engine reads, other keys."""
    mine, other = gguf.read(ours), gguf.read(theirs)
    my_data, other_data = (np.memmap(path, dtype=np.uint8, mode="r") for path in (ours, theirs))
    my_tensors, other_tensors = ({t.name: t for t in h.tensors} for h in (mine, other))
    differing = []
    for name in sorted(my_tensors.keys() | other_tensors.keys()):
        a, b = my_tensors.get(name), other_tensors.get(name)
        if a is None or b is None or (a.shape, a.type) != (b.shape, b.type):
            differing.append(name)
            continue
        here = my_data[a.offset : a.offset + a.size_bytes]
        if not np.array_equal(here, other_data[b.offset : b.offset + b.size_bytes]):
            differing.append(name)
    keys = sorted(
        key
        for key in mine.metadata.keys() | other.metadata.keys()
        if mine.metadata.get(key) != other.metadata.get(key)
    )
    read = [key for key in keys if key in _READ_BY_ENGINE or not key.startswith("general.")]
    return {
        "tensors": len(other_tensors),
        "differing_tensors": differing,
        "keys": len(other.metadata),
        "differing_keys": read,
        "differing_descriptions": [key for key in keys if key not in read],
    }


def same_files(conversion: Conversion) -> dict[str, dict[str, Any]]:
    """Converting alone, then quantizing alone: edgekit's own Q4_K_M of a float32 folder never
    rounds to F16 in between, so both quantizers must start from one file to be comparable.
    """
    conversion.ours("F16")
    conversion.ours(TYPE, conversion.their_file("F16"))
    files = {"F16 of the folder": "F16", f"{TYPE} of one F16 file": TYPE}
    return {
        what: same_file(conversion.our_file(kind), conversion.their_file(kind))
        for what, kind in files.items()
    }


def compare_matrices(ours: Path, theirs: Path) -> dict[str, Any]:
    """How equal two importance matrices are: weights in one only, correlation, difference."""
    mine, other = imatrix.read(ours), imatrix.read(theirs)
    shared = sorted(mine.keys() & other.keys())
    if not shared:
        raise EdgekitError("the two importance matrices have no weight in common")
    chunks = [gguf.read(path).metadata.get("imatrix.chunk_count") for path in (ours, theirs)]
    alike = {name: float(np.corrcoef(mine[name], other[name])[0, 1]) for name in shared}
    apart = {
        name: float(np.max(np.abs(mine[name] - other[name])) / np.max(np.abs(other[name])))
        for name in shared
    }
    worst = sorted(shared, key=alike.__getitem__)
    return {
        "chunks": chunks,
        "weights": len(shared),
        "in_one_only": sorted(mine.keys() ^ other.keys()),
        "median_correlation": alike[worst[len(worst) // 2]],
        "lowest_correlations": {name: alike[name] for name in worst[:3]},
        "largest_difference": max(apart.values()),
    }


def matrices(
    tools: peers.Tools, work: Path, reps: int, threads: int, quick: bool
) -> tuple[Costs, Costs, dict[str, Any]]:
    """What one F16 file to Q4_K_M by an importance matrix costs both sides, and its values."""
    model = peers.quantized(tools, work.parent, "F16")
    text = work / "calibration.txt"
    content = resources.files("edgekit.exporters").joinpath("calibration.txt").read_bytes()
    text.write_bytes(content[:_QUICK_TEXT_BYTES] if quick else content)
    our_folder, their_matrix, their_file = (
        work / name for name in ("ours-matrix", "theirs-matrix.gguf", "theirs-matrix-q4.gguf")
    )
    ours, theirs = Costs(), Costs()

    def our_side() -> None:
        options = ("--type", TYPE, "--calibration", text, "--chunks", _ALL_CHUNKS, "--no-receipt")
        argv = peers.edgekit("export", model, *options, "--out", our_folder)
        # A home of its own: nothing may come out of a cache.
        home = {"EDGEKIT_HOME": tempfile.mkdtemp(dir=work)}
        ours.add(measure.run(argv, env=home, memory=True))

    def their_side() -> None:
        argv = [tools.program("llama-imatrix"), "-m", model, "-f", text, "-o", their_matrix]
        matrix = measure.run([*argv, "--no-ppl", "-c", 512, "-t", threads], memory=True)
        argv = [tools.program("llama-quantize"), "--imatrix", their_matrix, model, their_file]
        theirs.add(matrix, measure.run([*argv, TYPE, threads], memory=True))

    measure.say("importance matrix")
    measure.in_turn(min(reps, 3), our_side, their_side)
    return ours, theirs, compare_matrices(our_folder / "imatrix.gguf", their_matrix)


def _cost_rows(what: str, ours: Costs, theirs: Costs, target: str | None) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, mine, other, unit, scale in (
        ("wall", ours.wall_s, theirs.wall_s, "s", 1.0),
        ("CPU", ours.cpu_s, theirs.cpu_s, "s", 1.0),
        ("peak RSS", ours.rss_bytes, theirs.rss_bytes, "MiB", float(1 << 20)),
    ):
        ratio = measure.ratios(mine, other)
        verdict = "-"
        if name == "wall" and target:
            verdict = "yes" if ratio.median <= 1 else "no"
        medians = [f"{measure.spread(side).median / scale:.4g} {unit}" for side in (other, mine)]
        rows.append([what, name, *medians, ratio, verdict])
    return rows


def _names(found: Sequence[str]) -> str:
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return ", ".join(found[:5]) + more if found else "none"


def main() -> None:
    """Print the three tables."""
    parser = measure.parser(__doc__, reps=5)
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="another Hugging Face folder than SmolLM2's"
    )
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": measure.describe_machine()}
    scratch = measure.scratch(arguments)
    tools = peers.find_tools(arguments.tools)
    reps = 1 if arguments.quick else arguments.reps
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        work = Path(folder)
        conversion = Conversion(
            tools, arguments.model or peers.hf_folder(scratch), work, arguments.threads
        )
        ours, theirs = Costs(), Costs()
        measure.say(f"folder to {TYPE}")
        measure.in_turn(
            reps,
            lambda: ours.add(conversion.ours(TYPE)),
            lambda: theirs.add(*conversion.theirs()),
        )
        head = ["work", "", "llama.cpp", "edgekit", "edgekit / llama.cpp", "at most 1"]
        measure.table(
            f"Costs (medians of {reps})", head, _cost_rows(f"folder to {TYPE}", ours, theirs, "1")
        )
        same = same_files(conversion)
        measure.table(
            "The same file?",
            ["file", "tensors", "that differ", "keys the engine reads that differ", "other keys"],
            [
                [
                    kind,
                    found["tensors"],
                    _names(found["differing_tensors"]),
                    _names(found["differing_keys"]),
                    _names(found["differing_descriptions"]),
                ]
                for kind, found in same.items()
            ],
        )
        my_costs, other_costs, equal = matrices(
            tools, work, reps, arguments.threads, arguments.quick
        )
    measure.table(
        f"Importance matrix (chunks: {equal['chunks'][0]} of edgekit, {equal['chunks'][1]} of"
        f" llama-imatrix; medians of {len(my_costs.wall_s)})",
        [*head[:-1], ""],
        _cost_rows(f"F16 to {TYPE} with it", my_costs, other_costs, None),
    )
    print(
        f"{equal['weights']} weights in both, in one only: {_names(equal['in_one_only'])}."
        f" Correlation {equal['median_correlation']:.6f} in the median; lowest: "
        + ", ".join(f"{name} {r:.6f}" for name, r in equal["lowest_correlations"].items())
        + f". Largest difference: {equal['largest_difference']:.1e} of a weight's largest value."
    )
    measure.finish(
        arguments,
        figures
        | {"export": [ours, theirs], "same": same, "imatrix": [my_costs, other_costs, equal]},
    )


if __name__ == "__main__":
    with ending():
        main()
