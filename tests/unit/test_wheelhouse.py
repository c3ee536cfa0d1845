"""A board gets the wheels that its Python, architecture and glibc can use, or a plain refusal."""

from __future__ import annotations

import json
from pathlib import Path

import board_wheels
import pytest

from edgekit import wheelhouse
from edgekit.errors import DeviceError, EdgekitError, UsageError
from edgekit.wheelhouse import Wheel

NUMPY = "numpy-2.3.1-cp{0}-cp{0}-manylinux_2_27_aarch64.manylinux_2_28_aarch64.whl"
LLAMA = "llama_cpp_python-0.3.36-py3-none-linux_aarch64.whl"


@pytest.mark.parametrize(
    ("file", "fits"),
    [
        ("a-1-py3-none-any.whl", True),
        ("a-1-py2.py3-none-any.whl", True),
        ("a-1-py2-none-any.whl", False),
        ("a-1-py312-none-any.whl", False),
        ("a-1-cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64.whl", True),
        ("a-1-cp311-cp311-manylinux2014_aarch64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_36_aarch64.whl", True),
        ("a-1-cp311-cp311-manylinux_2_37_aarch64.whl", False),
        ("a-1-cp311-cp311-manylinux_2_17_x86_64.whl", False),
        ("a-1-cp311-cp311-musllinux_1_2_aarch64.whl", False),
        ("a-1-cp311-cp311-macosx_11_0_arm64.whl", False),
        ("a-1-cp311-cp311d-linux_aarch64.whl", False),
        ("a-1-cp312-cp312-linux_aarch64.whl", False),
        ("a-1-cp39-abi3-linux_aarch64.whl", True),
        ("a-1-cp312-abi3-linux_aarch64.whl", False),
        ("a-1-2-py3-none-linux_aarch64.whl", True),
    ],
)
def test_tags_are_read_as_pip_reads_them(file: str, fits: bool) -> None:
    assert Wheel(file, 1, 1, "").fits("aarch64", "3.11.2", "2.36") is fits


def test_a_board_gets_one_wheel_of_each_package_for_its_python(tmp_path: Path) -> None:
    names = [NUMPY.format(minor) for minor in (311, 312, 313)]
    house = wheelhouse.read(board_wheels.tiny(tmp_path / "house", LLAMA, *names))
    chosen = house.chosen("aarch64", "3.12.7", "2.36")
    assert [wheel.name for wheel in chosen] == ["edgekit-deploy", "llama-cpp-python", "numpy"]
    assert chosen[-1].file == NUMPY.format(312)


@pytest.mark.parametrize(
    ("architecture", "python", "glibc", "words"),
    [
        ("x86_64", "3.11.2", "2.36", "are for aarch64, the board's Python is x86_64"),
        ("armv7l", "3.11.2", "2.36", "are for aarch64, the board's Python is armv7l"),
        ("aarch64", "3.10.12", "2.36", "no wheel of numpy for the board's Python 3.10.12"),
        ("aarch64", "3.11.2", "2.31", "the board has glibc 2.31, the wheels need 2.34"),
        ("aarch64", "3.11.2", None, "the board has no glibc"),
    ],
)
def test_a_board_that_the_wheels_do_not_suit_is_told_why(
    tmp_path: Path, architecture: str, python: str, glibc: str | None, words: str
) -> None:
    house = wheelhouse.read(board_wheels.tiny(tmp_path / "house", LLAMA, NUMPY.format(311)))
    with pytest.raises(DeviceError, match=words) as refused:
        house.chosen(architecture, python, glibc)
    assert "\n" not in refused.value.message


def test_a_wheelhouse_that_lacks_a_wheel_for_a_python_is_never_made(tmp_path: Path) -> None:
    folder = board_wheels.tiny(tmp_path / "house", NUMPY.format(311), NUMPY.format(312))
    with pytest.raises(DeviceError, match=r"numpy for the board's Python 3\.13"):
        wheelhouse.write(str(folder), "aarch64", "2.34")


def test_a_wheelhouse_needs_the_glibc_of_the_package_that_needs_the_newest(tmp_path: Path) -> None:
    names = ["llguidance-1.9.1-cp39-abi3-manylinux_2_31_aarch64.whl", NUMPY.format(311)]
    folder = board_wheels.tiny(tmp_path / "house", LLAMA, *names, glibc="2.17")
    house = wheelhouse.read(folder)
    assert house.glibc == "2.31"
    with pytest.raises(DeviceError, match=r"has glibc 2\.28, the wheels need 2\.31"):
        house.chosen("aarch64", "3.11.2", "2.28")
    assert len(house.chosen("aarch64", "3.11.2", "2.31")) == 4


def test_a_changed_wheel_is_noticed_before_it_is_sent(tmp_path: Path) -> None:
    house = wheelhouse.read(board_wheels.tiny(tmp_path / "house", LLAMA))
    chosen = house.chosen("aarch64", "3.11.2", "2.36")
    house.verify(chosen)
    with (house.folder / LLAMA).open("ab") as file:
        file.write(b"!")
    with pytest.raises(DeviceError, match="damaged"):
        house.verify(chosen)


def test_the_wheelhouse_of_scripts_build_is_found(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as missing:
        wheelhouse.find("aarch64")
    assert missing.value.hint is not None
    assert "scripts/build --wheelhouse aarch64" in missing.value.hint
    (home / "cache" / "wheels").mkdir(parents=True)
    made = board_wheels.tiny(home / "cache" / "wheels" / "wheelhouse-aarch64", LLAMA)
    assert wheelhouse.find("aarch64").folder == made
    other = board_wheels.tiny(tmp_path / "wheelhouse-aarch64", LLAMA)
    monkeypatch.setenv("EDGEKIT_WHEELS", str(tmp_path))
    assert wheelhouse.find("aarch64").folder == other


def _spoil(folder: Path, **changes: object) -> None:
    path = folder / wheelhouse.INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


_WHEEL = {"size_bytes": 1, "unpacked_bytes": 1, "sha256": "00"}


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"architecture": 3},
        {"surplus": 1},
        {"wheels": []},
        {"wheels": [_WHEEL | {"file": "edgekit_deploy-9.9-py3-none-any.whl"}]},
        {"wheels": [_WHEEL | {"file": "../a-1-py3-none-any.whl"}]},
        {"wheels": [_WHEEL | {"file": "/a-1-py3-none-any.whl"}]},
        {"wheels": [_WHEEL | {"file": "-r-1-py3-none-any.whl\n"}]},
    ],
    ids=str,
)
def test_a_spoilt_index_is_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = board_wheels.tiny(tmp_path / "house", LLAMA)
    _spoil(folder, **changes)
    with pytest.raises(UsageError):
        wheelhouse.read(folder)


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"\xff", b"{" + b" " * (1 << 20)])
def test_an_index_of_nonsense_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / wheelhouse.INDEX).write_bytes(text)
    with pytest.raises(EdgekitError):
        wheelhouse.read(tmp_path)
