"""Wheelhouses for tests: a tiny one of empty wheels, and a real one packed from this environment.

A wheel needs no network here: what is installed is packed again, and edgekit is built.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from edgekit import __version__, wheelhouse

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ".".join(platform.python_version_tuple()[:2])
_INSTALLED = (
    *("click", "diskcache", "jinja2", "llama-cpp-python", "markupsafe", "numpy", "pip"),
    *("pyyaml", "typing-extensions"),
)
# What pip wrote when it installed the wheel, and Python when it ran.
_NOT_PACKED = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")


def tiny(folder: Path, *names: str, architecture: str = "aarch64", glibc: str = "2.34") -> Path:
    """A wheelhouse of empty wheels: edgekit's own, and those of the given file names."""
    folder.mkdir()
    for name in (f"edgekit_deploy-{__version__}-py3-none-any.whl", *names):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("empty", b"")
    wheelhouse.write(str(folder), architecture, glibc, pythons=())
    return folder


def real(folder: Path) -> Path:
    """A wheelhouse for this machine, with all that a board like it needs."""
    folder.mkdir()
    for name in _INSTALLED:
        _pack(metadata.distribution(name), folder)
    _build_edgekit(folder)
    index(folder)
    return folder


def index(folder: Path) -> None:
    """Let the folder be a wheelhouse of what lies in it now."""
    glibc = platform.libc_ver()[1]
    wheelhouse.write(str(folder), platform.machine(), glibc, pythons=[PYTHON])


def _pack(package: metadata.Distribution, folder: Path) -> None:
    files = [
        file
        for file in package.files or []
        if ".." not in file.parts and "__pycache__" not in file.parts
        if not (file.parts[0].endswith(".dist-info") and file.name in _NOT_PACKED)
    ]
    info = next(file.parts[0] for file in files if file.parts[0].endswith(".dist-info"))
    with zipfile.ZipFile(folder / _file_name(package), "w") as archive:
        for file in files:
            archive.write(str(package.locate_file(file)), str(file))
        lines = [*(f"{file},," for file in files), f"{info}/RECORD,,"]
        archive.writestr(f"{info}/RECORD", "\n".join(lines))


def _file_name(package: metadata.Distribution) -> str:
    """The name that its wheel had: its tags stand in its metadata, one a line, uncompressed."""
    text = package.read_text("WHEEL") or ""
    tags = [line.split()[1].split("-") for line in text.splitlines() if line.startswith("Tag:")]
    columns = [".".join(dict.fromkeys(tag[i] for tag in tags)) for i in range(3)]
    name = package.metadata["Name"].replace("-", "_").lower()
    return "-".join((name, package.version, *columns)) + ".whl"


def _build_edgekit(folder: Path) -> None:
    tree = folder.with_name("tree")
    for name in ("edgekit", "exporters", "runtimes", "devices"):
        shutil.copytree(ROOT / name, tree / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, folder, tree], check=True)
    shutil.rmtree(tree)
