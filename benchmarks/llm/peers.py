"""The peers to measure against and the models to measure with: finds, builds and remembers them.

Prints what there is when it is run. Never measures.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measure

from edgekit import _proc, source
from edgekit.cli.ending import ending
from edgekit.errors import EdgekitError, UsageError

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m"
TYPES = ("F16", "Q8_0", "Q4_0", "Q4_K_M")
_TOOLS = ("llama-bench", "llama-quantize", "llama-imatrix", "llama-perplexity")
_BUILD_TIMEOUT_S = 3 * 3600


@dataclass(frozen=True)
class Tools:
    """The folder of llama.cpp's programs, compiled with the flags of edgekit's own wheel."""

    folder: Path

    def program(self, name: str) -> Path:
        """The path of ``llama-bench`` and the like."""
        return self.folder / name

    def bench(self, model: Path, *options: str | int) -> list[dict[str, Any]]:
        """The rows of a llama-bench run, parsed; batch sizes are those of edgekit."""
        argv = [self.program("llama-bench"), "-m", model, "-b", 512, "-ub", 512, "-o", "json"]
        return bench_rows(measure.run([*argv, *options]).stdout)


def bench_rows(text: str) -> list[dict[str, Any]]:
    """What llama-bench printed. Raises EdgekitError when it is not its JSON."""
    try:
        rows: list[dict[str, Any]] = json.loads(text)
    except ValueError:
        raise EdgekitError("llama-bench printed no JSON: is it another version?") from None
    return rows


def find_tools(folder: Path | None) -> Tools:
    """llama.cpp's programs in ``folder``, or as scripts/build compiles them (once, 10 minutes)."""
    if folder is None:
        measure.say("finding llama.cpp's programs (the first time, compiling them)")
        folder = Path(_build("--tools"))
    for name in _TOOLS:
        if not os.access(folder / name, os.X_OK):
            raise UsageError(
                f"{folder} has no program {name}", hint="scripts/build --tools compiles it"
            )
    return Tools(folder.resolve())


def find_converter() -> tuple[Path, dict[str, str]]:
    """llama.cpp's conversion script, and the environment variables that it needs."""
    folder = Path(_build("--source")) / "vendor" / "llama.cpp"
    script = folder / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise UsageError(f"{folder} has no {script.name}", hint="scripts/build --source unpacks it")
    return script, {"PYTHONPATH": str(folder / "gguf-py")}


def _build(option: str) -> str:
    return _proc.run([str(ROOT / "scripts/build"), option], timeout_s=_BUILD_TIMEOUT_S).strip()


def quantized(tools: Tools, scratch: Path, type_name: str) -> Path:
    """SmolLM2 as a GGUF of one type, made by llama-quantize (by way of F16) and kept."""
    path = scratch / f"{MODEL}-{type_name}.gguf"
    if path.is_file():
        return path
    measure.say(f"making {path.name}")
    # The built-in file is Q4_1; what matters to a comparison is that both sides get one file.
    start = source(MODEL).path if type_name in ("F16", "F32") else quantized(tools, scratch, "F16")
    partial = path.with_suffix(".partial")
    quantize = tools.program("llama-quantize")
    measure.run([quantize, "--allow-requantize", start, partial, type_name])
    partial.rename(path)
    return path


def hf_folder(scratch: Path) -> Path:
    """SmolLM2 as a Hugging Face folder, made by ``edgekit convert`` and kept."""
    folder = scratch / f"{MODEL}-hf"
    if not folder.is_dir():
        measure.say(f"making {folder.name}")
        measure.run(edgekit("convert", MODEL, "--out", folder))
    return folder


def edgekit(*arguments: str | Path) -> list[str | Path]:
    """The command line of edgekit's own program."""
    return [sys.executable, "-m", "edgekit", *arguments]


def main() -> None:
    """List the peers, with versions, and the models, with sizes."""
    arguments = measure.parser(__doc__, reps=1).parse_args()
    figures: dict[str, Any] = {"machine": measure.describe_machine()}
    scratch = measure.scratch(arguments)
    tools = find_tools(arguments.tools)
    script, _ = find_converter()
    models = {
        kind: quantized(tools, scratch, kind) for kind in (TYPES[:1] if arguments.quick else TYPES)
    }
    row = tools.bench(models["F16"], "-p", 1, "-n", 0, "-r", 1, "--no-warmup")[0]
    rows = [
        ("llama.cpp's programs", tools.folder, f"{row['build_commit']}, {row['backends']}"),
        ("conversion script", script, f"llama-cpp-python {version('llama-cpp-python')}"),
    ]
    sizes = {kind: path.stat().st_size for kind, path in models.items()}
    rows += [(f"{MODEL} {kind}", models[kind], f"{size:,} bytes") for kind, size in sizes.items()]
    if not arguments.quick:
        rows.append((f"{MODEL}, Hugging Face", hf_folder(scratch), ""))
    measure.table("Peers and models", ("what", "where", ""), rows)
    measure.finish(arguments, figures | {"build_commit": row["build_commit"], "bytes": sizes})


if __name__ == "__main__":
    with ending():
        main()
