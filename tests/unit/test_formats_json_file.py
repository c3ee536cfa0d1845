"""The strict JSON reader: what means one thing is read, the rest is refused by name."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from edgekit.errors import SourceError
from edgekit.formats import json_file


def _file(tmp_path: Path, raw: bytes) -> Path:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -2.5, None, True, {"b": "käse 🧀"}], "": 10**30},
        [],
        "text",
        0,
    ],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_reads_as_it_was_written(value: Any, ascii_only: bool, tmp_path: Path) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert json_file.read(_file(tmp_path, raw)) == value


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b'{"a": 1} x', "is not JSON"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice"),
        (b'[{"a": {"b": 1, "b": 1}}]', "has the key 'b' twice"),
        (b"[NaN]", "holds NaN"),
        (b"[-Infinity]", "holds -Infinity"),
        (b"[1e999]", "holds '1e999'"),
        (b"9" * 5000, "is not JSON"),
        (b'["\\ud800"]', "not Unicode"),
        (b'{"\\uDFFF": 1}', "not Unicode"),
        (b"[" * 65 + b"]" * 65, "deeper than 64"),
        (b"[" * 1_000_000, "deeper than 64"),
        (b'{"a":' * 1_000_000, "deeper than 64"),
        (b"[" + b"{}," * 3_000_000 + b"1]", "more than 4000000 JSON values"),
    ],
)
def test_what_is_not_strict_json_is_refused(raw: bytes, says: str, tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(SourceError) as caught:
        json_file.read(_file(tmp_path, raw))
    assert time.process_time() - start < 1
    assert caught.value.message.startswith("config.json ")
    assert says in caught.value.message
    assert len(caught.value.message) < 200


def test_sixty_four_levels_are_read(tmp_path: Path) -> None:
    json_file.read(_file(tmp_path, b"[" * 64 + b"]" * 64))


def test_a_larger_file_than_allowed_is_refused_unread(tmp_path: Path) -> None:
    path = _file(tmp_path, b"{}")
    os.truncate(path, 1 << 40)
    with pytest.raises(SourceError, match="more than the 1000 allowed"):
        json_file.read(path, max_bytes=1000)


def test_what_is_not_a_file_is_a_source_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "pipe"):
        with pytest.raises(SourceError):
            json_file.read(path)
