"""Install edgekit and llama.cpp on a board from a wheelhouse, and take all of it away again.

Knows the folder that edgekit has on a board; never how the board is reached, nor how wheels are
made. Nothing is compiled over there, and nothing fetched: the board may be offline.

``<home>/wheels/HASH`` holds the wheels, ``<home>/venvs/HASH`` an environment made of them, and the
link ``<home>/venv`` names the one in use: it changes in one step, when the new one is proven.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from edgekit import wheelhouse
from edgekit.board_link import printable
from edgekit.errors import DeviceError, RemoteCommandError
from edgekit.exporter import Progress, no_progress
from edgekit.target import BoardFacts, Finished, Target
from edgekit.wheelhouse import Wheel, Wheelhouse

ENVIRONMENT = "venv"
_STAGE = "set up"
_STEPS = 4
_RESERVE_BYTES = 64 << 20  # what pip unpacks beside the files, and room to live
_SILENCE_S = 600.0  # a Zero 2 W with a slow card says nothing for minutes

# Programs for the board's Python; their words come as arguments. Both know the folder's layout.
_LOOK = """
import os, sys
try:
    print(os.readlink(sys.argv[1]))
except OSError:
    pass
"""
_SWITCH = """
import os, sys
home, name, wheels = sys.argv[1:]
new = os.path.join(home, "venv.new")
if os.path.lexists(new):
    os.unlink(new)
os.symlink(os.path.join("venvs", name), new)
os.replace(new, os.path.join(home, "venv"))
for kind, kept in (("venvs", name), ("wheels", wheels)):
    for other in sorted(os.listdir(os.path.join(home, kind))):
        if other != kept:
            print(os.path.join(home, kind, other))
"""


@dataclass(frozen=True)
class SetupReport:
    """What ``setup`` did, or would do.

    ``wheels`` are file names. ``upload_bytes`` is their size and ``sent_bytes`` what of it went
    over: files that were there are not sent again. ``needed_bytes`` is the room for all of it.
    ``backend`` is llama.cpp's variant that the board's CPU took, ``warnings`` are those of
    ``edgekit doctor`` over there; None and none before it ran. ``already`` says that there was
    nothing to do.
    """

    device: str
    board: BoardFacts
    environment: str
    edgekit: str
    wheels: tuple[str, ...]
    upload_bytes: int
    needed_bytes: int
    dry_run: bool
    already: bool = False
    sent_bytes: int = 0
    backend: str | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def setup(
    target: Target,
    house: Wheelhouse | None = None,
    *,
    dry_run: bool = False,
    progress: Progress = no_progress,
) -> SetupReport:
    """Install what a wheelhouse holds (default: the one for the board's architecture) on a board.

    Runs on a bare system: python3 3.11 or newer is enough, without pip, venv's ensurepip or a
    network. An interrupted setup goes on where its upload stopped; an earlier environment works
    until the new one is proven. ``dry_run`` only looks. Raises DeviceError and its subclasses,
    UsageError without a fitting wheelhouse.
    """
    progress(_STAGE, 0, _STEPS)
    board = target.identify()
    house = house or wheelhouse.find(board.architecture)
    wheels = house.chosen(board.architecture, board.python, board.glibc)
    report = _plan(target.name, board, house, wheels, dry_run)
    name = _name(wheels)
    fresh = f"{board.home}/venvs/{name}"
    if _in_use(target, board) == f"venvs/{name}":
        report = replace(report, already=True)
        if dry_run:
            return report
        with suppress(DeviceError):  # it is spoilt: make it anew
            return _proven(target, report, fresh)
    _require_space(report)
    if dry_run:
        return report
    house.verify(wheels)
    sent_before = target.sent_bytes
    place = _bring(target, house, wheels, progress)
    report = replace(report, already=False, sent_bytes=target.sent_bytes - sent_before)
    progress(_STAGE, 1, _STEPS)
    _install(target, fresh, place, wheels)
    progress(_STAGE, 2, _STEPS)
    report = _proven(target, report, fresh)
    progress(_STAGE, 3, _STEPS)
    _switch(target, board, name, place)
    progress(_STAGE, _STEPS, _STEPS)
    return report


def remove(target: Target) -> BoardFacts:
    """Take away all that edgekit ever put on a board: environments, wheels, artifacts."""
    board = target.identify()
    target.remove(board.home)
    return board


def _plan(
    device: str, board: BoardFacts, house: Wheelhouse, wheels: tuple[Wheel, ...], dry_run: bool
) -> SetupReport:
    upload = sum(wheel.size_bytes for wheel in wheels)
    return SetupReport(
        device=device,
        board=board,
        environment=f"{board.home}/{ENVIRONMENT}",
        edgekit=house.edgekit,
        wheels=tuple(wheel.file for wheel in wheels),
        upload_bytes=upload,
        needed_bytes=upload + sum(wheel.unpacked_bytes for wheel in wheels) + _RESERVE_BYTES,
        dry_run=dry_run,
    )


def _name(wheels: tuple[Wheel, ...]) -> str:
    """The environment of exactly these wheels; other bytes make another name."""
    hashes = "".join(sorted(wheel.sha256 for wheel in wheels))
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]


def _require_space(report: SetupReport) -> None:
    """Before anything is sent; a board that has edgekit already needs the room once more."""
    if report.board.free_bytes < report.needed_bytes:
        raise DeviceError(
            f"{report.device} has {report.board.free_bytes / 1e6:.0f} MB free,"
            f" the setup needs {report.needed_bytes / 1e6:.0f} MB",
            hint=f"make room, or take an earlier edgekit away first:"
            f" edgekit devices setup {report.device} --remove",
        )


def _bring(target: Target, house: Wheelhouse, wheels: tuple[Wheel, ...], progress: Progress) -> str:
    """Send exactly the wheels that the board needs, and return their folder there."""
    with tempfile.TemporaryDirectory(prefix="edgekit-wheels-") as folder:
        for wheel in wheels:
            shutil.copyfile(house.folder / wheel.file, Path(folder) / wheel.file)
        return target.put(Path(folder), kind="wheels", progress=progress)


def _in_use(target: Target, board: BoardFacts) -> str:
    """The environment that the link names, such as ``venvs/HASH``; empty without one."""
    argv = ["python3", "-I", "-c", _LOOK, f"{board.home}/{ENVIRONMENT}"]
    return _ran(target, argv, "looking for an earlier setup").stdout.strip()


def _install(target: Target, fresh: str, place: str, wheels: tuple[Wheel, ...]) -> None:
    """A new environment of these wheels; what an interrupted setup left of it goes first.

    Without ensurepip, which Debian keeps in a package of its own: pip runs from its own wheel.
    """
    argv = ["python3", "-I", "-m", "venv", "--clear", "--without-pip", fresh]
    _ran(target, argv, "making an environment")
    pip = next(wheel for wheel in wheels if wheel.name == wheelhouse.PIP)
    argv = [f"{fresh}/bin/python", "-I", f"{place}/{pip.file}/pip", "install", "--no-index"]
    argv += ["--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    # Python compiles a module when it is first used; pip would compile every file on a slow core.
    argv += ["--no-compile", "--quiet"]
    argv += [f"{place}/{wheel.file}" for wheel in wheels if wheel is not pip]
    _ran(target, argv, "pip")


def _proven(target: Target, report: SetupReport, fresh: str) -> SetupReport:
    """What ``edgekit doctor`` says over there; DeviceError when llama.cpp does not load."""
    argv = [f"{fresh}/bin/python", "-I", "-m", "edgekit", "doctor", "--json"]
    done = _ran(target, argv, "edgekit doctor")
    try:
        body = json.loads(done.stdout)
        engine, warnings = body["engine"], body["warnings"]
        backend, problem = engine["backend"], engine["problem"]
        texts = (*warnings, backend or "", problem or "")
        if not all(isinstance(text, str) and text.isprintable() for text in texts if text):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise RemoteCommandError(
            f"edgekit doctor on {report.device} gave no answer that can be read"
        ) from None
    if problem or engine["version"] is None:
        raise DeviceError(
            f"llama.cpp does not load on {report.device}: {problem or 'it is not installed'}",
            hint="what was set up before still works",
        )
    return replace(report, backend=backend, warnings=tuple(warnings))


def _switch(target: Target, board: BoardFacts, name: str, place: str) -> None:
    """Let the link name the proven environment, and remove what was there before it."""
    argv = ["python3", "-I", "-c", _SWITCH, board.home, name, os.path.basename(place)]
    for old in _ran(target, argv, "switching to the new environment").stdout.splitlines():
        target.remove(old)


def _ran(target: Target, argv: list[str], what: str) -> Finished:
    done = target.run(argv, silence_s=_SILENCE_S)
    if done.code:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it said nothing"]
        raise RemoteCommandError(
            f"{what} on {target.name} ended with exit code {done.code}: {printable(words[-1])}"
        )
    return done
