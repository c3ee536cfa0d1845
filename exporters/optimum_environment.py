"""An environment of its own for optimum-cli, whose pins clash with edgekit's: made on demand, once.

Knows which versions go into it and where it lies; never what is converted there. Wheels alone are
fetched, by pip and as pip is configured, into a folder that an interrupted run leaves for the next
one; nothing of them is imported here.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from edgekit import _fs, _proc
from edgekit.errors import DownloadError, EdgekitError
from edgekit.exporter import Progress

# Versions that work together; what they need beside follows from them.
PINS = (
    *("torch==2.13.0", "transformers==4.57.6", "optimum==2.1.0", "optimum-onnx==0.1.0"),
    *("onnx==1.23.2", "onnxruntime==1.31.1", "numpy==2.4.6"),
)
_COMPLETE = "edgekit-complete"  # written last: a folder without it is made anew
_STAGE = "environment of optimum-cli"
_QUICK_S, _SLOW_S = 120, 3600
_PIP = ("--disable-pip-version-check", "--no-input", "--quiet", "--only-binary", ":all:")


def python(progress: Progress, pins: tuple[str, ...] = PINS) -> Path:
    """The interpreter of the environment with ``pins``, which is made where it is not there yet.

    Raises DownloadError where pip cannot fetch it, UsageError while another process makes it,
    OutOfSpaceError.
    """
    root = _fs.home("cache") / "optimum" / _name(pins)
    interpreter = root / "bin" / "python"
    if (root / _COMPLETE).exists():
        return interpreter
    with _fs.disk_errors(root):
        root.parent.mkdir(parents=True, exist_ok=True)
    wheels = root.with_name(f"{root.name}.wheels")
    with _fs.locked(root):
        if not (root / _COMPLETE).exists():  # while this one waited
            _make(root, wheels, interpreter, pins, progress)
    return interpreter


def _name(pins: tuple[str, ...]) -> str:
    """Other pins, or another Python, make another environment."""
    words = "\0".join((*pins, sys.version, sys.prefix))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def _make(
    root: Path, wheels: Path, interpreter: Path, pins: tuple[str, ...], progress: Progress
) -> None:
    pip = [str(interpreter), "-I", "-m", "pip"]
    # Whole files alone stay in the folder of wheels; those that are there are not fetched again.
    fetch = ["--retries", "2", "--timeout", "15", "--dest", str(wheels)]
    found = ["--no-index", "--find-links", str(wheels)]
    steps = (
        ([sys.executable, "-I", "-m", "venv", "--clear", str(root)], _QUICK_S),
        ([*pip, "download", *_PIP, *fetch, *pins], _SLOW_S),
        ([*pip, "install", *_PIP, *found, *pins], _SLOW_S),
    )
    for number, (argv, limit_s) in enumerate(steps):
        progress(_STAGE, number, len(steps))
        try:
            _proc.run(argv, timeout_s=limit_s)
        except EdgekitError as error:
            raise DownloadError(
                f"no environment for optimum-cli: {error.message.rpartition(': ')[2]}"[:300],
                hint="it is fetched once, with torch: connect this machine, or let pip find the"
                " wheels (PIP_FIND_LINKS=FOLDER PIP_NO_INDEX=1); without --via nothing is fetched",
            ) from None
    _fs.write_atomic(root / _COMPLETE, "\n".join(pins).encode())
    _fs.remove_tree(wheels)
    progress(_STAGE, len(steps), len(steps))
