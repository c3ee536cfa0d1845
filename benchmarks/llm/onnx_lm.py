"""edgekit's int4 ONNX language model against onnxruntime-genai's default, and against a GGUF.

    benchmarks/llm/onnx_lm.py [--gguf TYPES] [--text FILE] [--peer-python PATH]

All are made of SmolLM2, moved off the grid that it was stored on (``reference.py``). Quality is the
KL divergence from the float32 graph on held-out text, over the second half of each chunk of 512
tokens. Speed is taken in turns, and for every repetition all models are loaded anew, in another
order: where a process happens to lie in memory can move its speed by a third. The peer runs in an
environment of its own, made in the scratch folder unless ``--peer-python`` names one.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import presets
import reference
from tokenizers import Tokenizer

import edgekit
from edgekit.cli.ending import ending
from edgekit.converter import convert

PACKAGES = (
    *("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx==1.23.2", "onnx-ir==1.1.0"),
    *("transformers==5.23.0", "torch==2.13.0", "numpy==2.4.6"),
)
_SIDE = Path(__file__).parent / "onnx_side.py"
_CHUNK = 512


class Side:
    """A model in a process of its own."""

    def __init__(self, python: str | Path, kind: str, model: Path, threads: int) -> None:
        argv = [str(part) for part in (python, _SIDE, kind, model, threads)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def ask(self, line: str) -> Any:
        """The answer to one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args!r} ended early")
        return json.loads(line)

    def speed(self, verb: str, count: int) -> float:
        """Tokens a second of one turn."""
        return 1 / float(self.ask(f"{verb} {count}"))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def environment(scratch: Path) -> Path:
    """The interpreter of an environment with the peer."""
    folder = scratch / "genai-environment"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        measure.say("making an environment for onnxruntime-genai")
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
        (folder / "complete").touch()
    return python


def build_peer(python: Path, folder: Path, scratch: Path) -> Path:
    """genai's own int4 of a Hugging Face folder, with its builder's defaults; made once."""
    out = scratch / "genai-int4"
    if not (out / "model.onnx").exists():
        measure.say("building onnxruntime-genai's int4")
        argv = [python, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", out]
        argv += ["-p", "int4", "-e", "cpu", "-c", scratch / "genai-cache"]
        argv += ["--extra_options", "int4_accuracy_level=4"]
        measure.run(argv)
    return out


def quality(truth: Path, found: Path) -> dict[str, float]:
    """Mean and 99th percentile of the KL divergence in nats, and the share of equal favourites."""
    kl, same = [], []
    for exact, other in zip(
        np.load(truth, mmap_mode="r"), np.load(found, mmap_mode="r"), strict=True
    ):
        logs = [_log_softmax(side) for side in (exact, other)]
        kl.append((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1))
        same.append(logs[0].argmax(axis=1) == logs[1].argmax(axis=1))
    every = np.concatenate(kl)
    return {
        "mean_kl": float(every.mean()),
        "p99_kl": float(np.quantile(every, 0.99)),
        "same_top1": float(np.concatenate(same).mean()),
    }


def race(
    start: Mapping[str, Callable[[], Side]], counts: Mapping[str, int], reps: int
) -> dict[str, dict[str, list[float]]]:
    """Speeds of each model by verb, one for every repetition: the median of three turns."""
    found: dict[str, dict[str, list[float]]] = {name: {v: [] for v in counts} for name in start}
    chance = random.Random(0)
    for _ in range(reps):
        order = list(start)
        chance.shuffle(order)
        running = {name: start[name]() for name in order}
        for verb, count in counts.items():
            turns: dict[str, list[float]] = {name: [] for name in order}
            for names in (order, order[::-1], order):
                for name in names:
                    turns[name].append(running[name].speed(verb, count))
            for name, speeds in turns.items():
                found[name][verb].append(statistics.median(speeds))
        for side in running.values():
            side.close()
    return found


def _log_softmax(logits: Any) -> Any:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def _size(model: Path) -> int:
    if model.is_dir():
        return sum(path.stat().st_size for path in model.glob("model.onnx*"))
    return sum(path.stat().st_size for path in model.parent.glob(f"{model.name}*"))


def main() -> None:
    """Print both tables."""
    parser = measure.parser(__doc__, reps=9)
    parser.add_argument("--peer-python", type=Path, metavar="PATH")
    parser.add_argument("--chunks", type=int, default=20, help="held-out chunks (default 20)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="held-out text")
    parser.add_argument("--gguf", default="Q4_1,Q4_K_M", metavar="A,B", help="GGUF types beside it")
    parser.add_argument("--seed", type=int, default=1, help="of the reference's scales")
    parser.add_argument("--no-speed", action="store_true", help="only the table of quality")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"machine": measure.describe_machine()}
    scratch, threads = measure.scratch(arguments), arguments.threads
    chunks, prompt, steps, reps = arguments.chunks, 512, 64, arguments.reps
    if arguments.quick:
        chunks, prompt, steps, reps = 1, 16, 4, 1
    model = reference.make(scratch, arguments.seed)
    folder = model.with_name(f"{model.stem}-hf")
    if not folder.is_dir():
        convert(model, folder)
    python = arguments.peer_python or environment(scratch)
    sides = {"genai int4": ("genai", python, build_peer(python, folder, scratch))}
    ours = scratch / "onnx-lm"
    for name, source, format_, options in (
        ("float32", folder, "onnx", {"bits": 32}),
        ("edgekit int4", folder, "onnx", {"bits": 4}),
        *((kind, model, "gguf", {"type": kind}) for kind in arguments.gguf.split(",")),
    ):
        out = ours / name.replace(" ", "-")
        measure.say(f"exporting {name}")
        if not out.exists():
            edgekit.export(source, format_, out=out, receipt=False, **options)
        kind = "edgekit" if format_ == "onnx" else "gguf"
        sides[name] = kind, sys.executable, edgekit.Artifact.open(out).model_path
    text = presets.held_out_text(arguments.text, chunks).decode("utf-8", "replace")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        work = Path(name)
        cut = [ids[at : at + _CHUNK] for at in range(0, chunks * _CHUNK, _CHUNK)]
        (work / "chunks.json").write_text(json.dumps(cut))
        start = {
            label: partial(Side, interpreter, kind, path, threads)
            for label, (kind, interpreter, path) in sides.items()
        }
        for label in sides:
            measure.say(f"logits of {label}")
            side = start[label]()
            side.ask(f"logits {work / 'chunks.json'} {work / label.replace(' ', '-')}.npy")
            side.close()
        truth = work / "float32.npy"
        for label, (_, _, path) in sides.items():
            found = quality(truth, work / f"{label.replace(' ', '-')}.npy")
            rows.append({"model": label, "bytes": _size(path), **found})
    counts = {} if arguments.no_speed else {"prefill": prompt, "decode": steps}
    speeds = race(start, counts, reps)
    peer = speeds["genai int4"]
    measure.table(
        f"Float reference, {chunks} chunks of held-out text; speeds as multiples of genai's",
        ["model", "bytes", "mean KL", "p99 KL", "same top-1", "decode", "prefill", "decode tok/s"],
        [
            [
                row["model"],
                f"{row['bytes']:,}",
                f"{row['mean_kl']:.4f}",
                f"{row['p99_kl']:.3f}",
                f"{row['same_top1']:.1%}",
                *(
                    measure.ratios(speeds[row["model"]][verb], peer[verb]) if peer else "-"
                    for verb in ("decode", "prefill")
                ),
                f"{np.median(speeds[row['model']]['decode']):.0f}" if peer else "-",
            ]
            for row in rows
        ],
    )
    measure.finish(arguments, figures | {"rows": rows, "speeds": speeds})


if __name__ == "__main__":
    with ending():
        main()
