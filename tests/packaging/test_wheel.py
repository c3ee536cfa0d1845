"""What people install: the whole house, nothing beside it, and a base that needs almost nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import edgekit
from edgekit.errors import DISTRIBUTION, MissingExtraError

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("edgekit", "exporters", "runtimes", "devices")
EXTRAS = {"llama", "ort", "tflite", "export", "onnx", "openvino"}
EXTRAS |= {"train", "finetune", "datasets", "serve", "plot", "all"}
TOO_LARGE = {"tflite-convert"}  # for `all`


def tracked_files() -> list[str]:
    """What git knows and this checkout has."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    return [name for name in listed if name and (ROOT / name).is_file()]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a build folder behind, and reads an old one."""
    tree = tmp_path_factory.mktemp("tree")
    for name in tracked_files():
        if name.partition("/")[0] in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    out = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, out, tree], check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def base_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with edgekit's wheel, click and PyYAML, and nothing else: no extra is there."""
    home = tmp_path_factory.mktemp("base")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    site = next(home.glob("lib/python3*/site-packages"))
    for name in ("click", "pyyaml"):
        package = metadata.distribution(name)
        for file in package.files or []:
            if ".." not in file.parts:
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(package.locate_file(file), site / file)
    options = ["--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([sys.executable, "-m", "pip", *options, str(wheel)], check=True)
    return python


def _run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([python, *arguments], cwd=cwd, capture_output=True, text=True)


def test_the_wheel_holds_every_file_of_the_four_folders(wheel: Path) -> None:
    expected = set()
    for name in tracked_files():
        folder = name.partition("/")[0]
        if folder in FOLDERS:
            expected.add(name if folder == "edgekit" else f"edgekit/{name}")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_wheel_carries_its_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_version_stands_in_the_source_alone(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == edgekit.__version__
    assert metadata.version(DISTRIBUTION) == edgekit.__version__


def test_the_wheel_that_scripts_build_makes_is_the_one_that_the_extra_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    built = re.search(r"^version=(.+)$", (ROOT / "scripts/build").read_text(), re.MULTILINE)
    assert built is not None
    assert f"llama-cpp-python=={built[1]}" in project["optional-dependencies"]["llama"]


def test_the_base_install_pulls_only_click_and_yaml() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [line.partition(">")[0] for line in project["dependencies"]] == ["click", "pyyaml"]


def test_every_extra_exists_and_all_is_their_union() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(extras) == EXTRAS | TOO_LARGE
    (union,) = extras["all"]
    assert set(union.partition("[")[2].strip("]").split(",")) == EXTRAS - {"all"}


def test_every_missing_extra_that_the_code_reports_exists() -> None:
    named = {
        extra
        for name in tracked_files()
        if name.endswith(".py") and name.startswith(FOLDERS)
        for extra in re.findall(
            r"(?:MissingExtraError\(|extra=)\"([\w-]+)\"", (ROOT / name).read_text()
        )
    }
    assert named and named <= EXTRAS | TOO_LARGE


def test_nothing_we_ship_names_the_other_projects_distribution() -> None:
    """`pip install edgekit` would install somebody else's package."""
    for name in tracked_files():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", "") and name.startswith(
            (*FOLDERS, "docs", "scripts", "README")
        ):
            text = path.read_text()
            assert "install edgekit\n" not in text and "install edgekit " not in text, name
            assert "install 'edgekit[" not in text and 'install "edgekit[' not in text, name


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["doctor"]])
def test_the_base_install_starts(base_python: Path, tmp_path: Path, arguments: list[str]) -> None:
    command = base_python.with_name("edgekit")
    done = subprocess.run([command, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert metadata.version(DISTRIBUTION) in done.stdout or "Commands" in done.stdout


def test_a_missing_extra_prints_the_exact_pip_line(
    base_python: Path, tmp_path: Path, smollm2_gguf: Path
) -> None:
    command = base_python.with_name("edgekit")
    done = subprocess.run(
        [command, "export", smollm2_gguf, "--format", "gguf", "--bits", "4", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == MissingExtraError.exit_code
    assert "pip install 'edgekit-deploy[" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shelf", ["exporters", "runtimes", "devices"])
def test_a_shelf_says_how_it_is_imported(shelf: str) -> None:
    done = _run(Path(sys.executable), "-c", f"import {shelf}", cwd=ROOT)
    assert done.returncode == 1
    assert f"import edgekit.{shelf}" in done.stderr.splitlines()[-1]
