"""YAML is plain data with line numbers in every complaint."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit import _yaml
from edgekit.errors import ProfileError, UsageError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "f.yaml:2: key 'a' appears twice"),
        ("a: &x 1\nb: *x", "f.yaml:2: aliases are not allowed"),
        ("a: !!python/object/apply:os.system ['true']", "f.yaml:1: could not determine"),
        ("1: x", "f.yaml:1: key 1 is not a string"),
        ("a: [", "f.yaml:1: "),
        ("[" * 60, "nested deeper than"),
        ("a: " + "9" * 65, "f.yaml:1: a number of more than 64 characters"),
        ("a: " + "1:" * 33 + "1.5", "f.yaml:1: a number of more than 64 characters"),
        ("a: \x00", "f.yaml: not valid YAML"),
        ("x" * (_yaml.MAX_BYTES + 1), "larger than"),
    ],
)
def test_hostile_or_sloppy_yaml_is_refused(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message.replace("[", r"\[")):
        _yaml.parse(text, origin="f.yaml", error=ProfileError)


def test_plain_data_comes_back(tmp_path: Path) -> None:
    data = {"name": "rpi5", "cores": 4, "isa": ["neon", "dotprod"], "gbps": 9.3, "none": None}
    (tmp_path / "f.yaml").write_text(_yaml.dump(data))
    assert _yaml.read(tmp_path / "f.yaml") == data


def test_unreadable_files_are_our_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        _yaml.read(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        _yaml.read(tmp_path / "latin.yaml")
