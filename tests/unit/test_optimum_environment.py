"""The environment of optimum-cli: whole or not there, made once, and one clear error offline."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from edgekit.errors import DownloadError
from edgekit.exporter import no_progress
from edgekit.exporters import optimum_environment

_PINS = ("edgekit-test-tiny==1.0",)


def _wheel(folder: Path) -> None:
    """A package of one module, as a wheel."""
    folder.mkdir()
    name = "edgekit_test_tiny-1.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("edgekit_test_tiny.py", "VALUE = 7\n")
        facts = "Metadata-Version: 2.1\nName: edgekit-test-tiny\nVersion: 1.0\n"
        wheel.writestr(f"{name}.dist-info/METADATA", facts)
        tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{name}.dist-info/WHEEL", tag)
        wheel.writestr(f"{name}.dist-info/RECORD", "")


def test_offline_it_says_what_is_missing_and_goes_on_later(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    with pytest.raises(DownloadError, match="edgekit-test-tiny") as caught:
        optimum_environment.python(no_progress, _PINS)
    assert "--via" in str(caught.value.hint)
    _wheel(tmp_path / "wheels")
    python = optimum_environment.python(no_progress, _PINS)
    said = subprocess.run(
        [python, "-I", "-c", "import edgekit_test_tiny as t; print(t.VALUE)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "7\n" and home in python.parents
    # What was fetched on the way is gone, and the next call starts nothing.
    assert [each.name for each in python.parents[2].iterdir()] == [python.parents[1].name]
    monkeypatch.setattr("edgekit._proc.run", None)
    assert optimum_environment.python(no_progress, _PINS) == python
