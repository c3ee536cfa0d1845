"""Wheelhouses: folders with every wheel that a board needs, and which of them fit which board.

Knows wheel file names and ``wheelhouse.json``; never how wheels are made (scripts/build does that),
how they come to a board, or what is in them.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekit import __version__, _fs, typed_json
from edgekit.errors import DISTRIBUTION, DeviceError, UsageError

INDEX = "wheelhouse.json"
PIP = "pip"
PACKAGES = "packages.txt"
SCHEMA = 1
PYTHONS = ("3.11", "3.12", "3.13")
_MAX_INDEX_BYTES = 1 << 20
_AGAIN = "make it again: scripts/build --wheelhouse"
# name-version(-build)-python-abi-platform.whl; names and versions hold no dash (PEP 427).
_NAME = re.compile(
    r"([A-Za-z0-9_.]+)-([A-Za-z0-9_.+!]+)(?:-[0-9][A-Za-z0-9_.]*)?"
    r"-([a-z0-9_.]+)-([a-z0-9_.]+)-([A-Za-z0-9_.]+)\.whl"
)
_OLD_TAGS = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}


@dataclass(frozen=True)
class Wheel:
    """One file. ``unpacked_bytes`` is what it takes when it is installed."""

    file: str
    size_bytes: int
    unpacked_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.file):
            raise ValueError(f"{self.file!a} is no wheel")

    @property
    def name(self) -> str:
        """The distribution, in its normal form (PEP 503): ``edgekit-deploy``."""
        return re.sub(r"[-_.]+", "-", self._parts[0]).lower()

    @property
    def version(self) -> str:
        return self._parts[1]

    @property
    def _parts(self) -> tuple[str, ...]:
        found = _NAME.fullmatch(self.file)
        assert found is not None
        return found.groups()

    def oldest_glibc(self, architecture: str) -> tuple[int, ...]:
        """What its tags ask for; (0, 0) where they ask for none."""
        needed = [_glibc_of(tag) for tag in _platforms(self._parts[4], architecture)]
        return min((each for each in needed if each is not None), default=(0, 0))

    def fits(self, architecture: str, python: str, glibc: str) -> bool:
        """Whether CPython ``python`` on Linux of that architecture and glibc can use it.

        The tags are those of https://packaging.python.org/specifications/platform-compatibility-tags
        """
        _, _, pythons, abis, platforms = self._parts
        return any(
            _python_fits(tag, abi, _numbers(python)[:2])
            for tag in pythons.split(".")
            for abi in abis.split(".")
        ) and any(
            needed is not None and needed <= _numbers(glibc)[:2]
            for needed in map(_glibc_of, _platforms(platforms, architecture))
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _python_fits(tag: str, abi: str, python: tuple[int, ...]) -> bool:
    found = re.fullmatch(r"(py|cp)(\d)(\d*)", tag)
    if not found or int(found[2]) != python[0]:
        return False
    minor = int(found[3] or 0)
    if found[1] == "py":
        return abi == "none" and minor <= python[1]
    if abi == "abi3":
        return minor <= python[1]
    return minor == python[1] and abi in (f"cp{found[2]}{minor}", "none")


def _platforms(tags: str, architecture: str) -> list[str]:
    """``manylinux_2_17_aarch64.manylinux2014_aarch64`` -> both; the numbers hold no dots."""
    return [tag.removesuffix(f"_{architecture}") for tag in tags.split(".")]


def _glibc_of(tag: str) -> tuple[int, ...] | None:
    """The glibc that a platform needs; None for one that is not this."""
    if tag in ("any", "linux"):
        return 0, 0
    new = re.fullmatch(r"manylinux_(\d+)_(\d+)", tag)
    return (int(new[1]), int(new[2])) if new else _OLD_TAGS.get(tag)


@dataclass(frozen=True)
class _Index:
    """``wheelhouse.json``. ``glibc`` is the oldest that has a wheel of every package."""

    schema: int
    architecture: str
    glibc: str
    wheels: tuple[Wheel, ...]


@dataclass(frozen=True)
class Wheelhouse:
    """A folder of wheels for boards of one architecture."""

    folder: Path
    architecture: str
    glibc: str
    wheels: tuple[Wheel, ...]

    @property
    def edgekit(self) -> str:
        """The version of edgekit in it."""
        return next(wheel.version for wheel in self.wheels if wheel.name == DISTRIBUTION)

    def chosen(self, architecture: str, python: str, glibc: str | None) -> tuple[Wheel, ...]:
        """One wheel of each package, for the board that is described.

        Raises DeviceError with the reason when this wheelhouse does not suit the board.
        """
        if architecture != self.architecture:
            raise DeviceError(
                f"the wheels in {self.folder} are for {self.architecture}, the board's Python"
                f" is {architecture}",
                hint=f"scripts/build --wheelhouse {architecture}"
                if architecture in ("aarch64", "x86_64")
                else "edgekit needs a 64-bit system: Raspberry Pi OS (64-bit), for one",
            )
        if glibc is None:
            raise DeviceError("the board has no glibc, and the wheels need one")
        if _numbers(glibc) < _numbers(self.glibc):
            raise DeviceError(
                f"the board has glibc {glibc}, the wheels need {self.glibc}",
                hint="Raspberry Pi OS bookworm and Debian 12 have it",
            )
        found = {
            wheel.name: wheel for wheel in self.wheels if wheel.fits(architecture, python, glibc)
        }
        if missing := {wheel.name for wheel in self.wheels} - found.keys():
            raise DeviceError(
                f"there is no wheel of {min(missing)} for the board's Python {python}",
                hint=f"edgekit runs on Python {' to '.join((PYTHONS[0], PYTHONS[-1]))}",
            )
        return tuple(found[name] for name in sorted(found))

    def verify(self, wheels: tuple[Wheel, ...]) -> None:
        """Read files again. Raises DeviceError for bytes that are not those of the index."""
        for wheel in wheels:
            path = self.folder / wheel.file
            if not path.is_file() or _fs.sha256_file(path) != wheel.sha256:
                raise DeviceError(
                    f"{path} is damaged or missing",
                    hint=_AGAIN,
                )


def find(architecture: str) -> Wheelhouse:
    """The wheelhouse that scripts/build made for boards of ``architecture``.

    Looked for in EDGEKIT_WHEELS, else where scripts/build puts it. Raises what ``read`` raises.
    """
    own = os.environ.get("EDGEKIT_WHEELS")
    wheels = Path(own) if own else _fs.home("cache") / "wheels"
    folder = wheels / f"wheelhouse-{architecture}"
    if not folder.is_dir():
        raise UsageError(
            f"there are no wheels for {architecture} here ({folder})",
            hint=f"scripts/build --wheelhouse {architecture} makes them, in a checkout of edgekit;"
            " --wheelhouse DIR names others",
        )
    return read(folder)


def read(folder: Path) -> Wheelhouse:
    """Open a wheelhouse. Raises UsageError when it is none, is spoilt, or has another edgekit."""
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_INDEX_BYTES + 1)
        if len(text) > _MAX_INDEX_BYTES:
            raise ValueError("too large")
        index = typed_json.read(_Index, json.loads(text), INDEX)
        if index.schema != SCHEMA:
            raise ValueError(f"schema {index.schema} is not {SCHEMA}")
    except OSError as error:
        raise UsageError(f"{folder} is no wheelhouse: {error.strerror} ({INDEX})") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}", hint=_AGAIN) from None
    house = Wheelhouse(folder, index.architecture, index.glibc, index.wheels)
    versions = {wheel.version for wheel in house.wheels if wheel.name == DISTRIBUTION}
    if versions != {__version__}:
        held = ", ".join(sorted(versions)) or "no edgekit"
        raise UsageError(
            f"{folder} holds edgekit {held}, this is {__version__}",
            hint=f"scripts/build --wheelhouse {house.architecture}",
        )
    return house


def write(folder: str, architecture: str, glibc: str, pythons: Sequence[str] = PYTHONS) -> None:
    """Make a folder of wheels a wheelhouse: hash them all, and check that every Python is served.

    ``glibc`` is what the wheels with plain linux tags need; others may need a newer one. PACKAGES
    gets the names of what is to be installed, for ``pip install -r``. For scripts/build.
    Raises DeviceError when a package lacks a wheel for one of ``pythons``.
    """
    place = Path(folder)
    wheels = tuple(_wheels(place))
    glibc = _oldest_glibc(wheels, architecture, glibc)
    index = _Index(SCHEMA, architecture, glibc, wheels)
    house = Wheelhouse(place, architecture, glibc, index.wheels)
    for python in pythons:
        house.chosen(architecture, python, glibc)
    names = sorted({wheel.name for wheel in index.wheels} - {PIP})
    _fs.write_atomic(place / PACKAGES, "".join(f"{name}\n" for name in names).encode())
    text = json.dumps(typed_json.write(index), indent=2)
    _fs.write_atomic(place / INDEX, text.encode() + b"\n")


def _oldest_glibc(wheels: Sequence[Wheel], architecture: str, glibc: str) -> str:
    """``glibc``, or what the package needs that needs the newest."""
    needed: dict[str, tuple[int, ...]] = {}
    for wheel in wheels:
        own = wheel.oldest_glibc(architecture)
        needed[wheel.name] = min(own, needed.get(wheel.name, own))
    newest = max(needed.values(), default=(0, 0))
    return glibc if newest <= _numbers(glibc)[:2] else ".".join(map(str, newest))


def _wheels(folder: Path) -> Iterator[Wheel]:
    for path in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        yield Wheel(path.name, path.stat().st_size, unpacked, _fs.sha256_file(path))
