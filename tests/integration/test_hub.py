"""A hub id becomes a verified folder, whatever the network does."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import sys
from collections.abc import Iterator
from typing import Any

import hub_server
import planned_gguf
import pytest

from edgekit import _fs, hub
from edgekit.errors import (
    ChecksumError,
    DownloadError,
    OutOfSpaceError,
    SourceError,
    UnsafeModelError,
    UsageError,
)
from edgekit.plan import plan
from edgekit.source import source

pytest.importorskip("huggingface_hub")


REPO, COMMIT = hub_server.REPO, hub_server.COMMIT
MIB = 1 << 20


def _safetensors(size_bytes: int) -> bytes:
    header = json.dumps(
        {"a": {"dtype": "U8", "shape": [size_bytes], "data_offsets": [0, size_bytes]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + random.Random(7).randbytes(size_bytes)


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
    "2_Dense/config.json": b"never fetched",
    "model.safetensors": _safetensors(24 * MIB),
    "consolidated.safetensors": b"the same weights under other names",
    "pytorch_model.bin": b"\x80\x02never fetched",
    "modeling_tiny.py": b"raise SystemExit('never fetched')",
    "README.md": b"# tiny",
}
KEPT = ("config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A running stand-in hub with one model."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # The library waits a second before each new try; its waiting is not what is tested here.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    with hub_server.serve(hub_server.Hub(dict(FILES))) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def _snapshots() -> list[str]:
    folder = _fs.home("cache") / "hub" / "acme--tiny"
    return sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []


def test_a_branch_is_resolved_to_its_commit_and_only_the_needed_files_come(tiny: Any) -> None:
    found = source(REPO)
    assert found.revision == COMMIT
    assert found.family == "llama"
    assert set(found.files) == set(KEPT)
    here = [path for path in found.path.rglob("*") if path.is_file()]
    assert {path.relative_to(found.path).as_posix() for path in here} == set(KEPT)
    assert {name for name, _ in tiny.asked} == set(KEPT)
    assert found.hashes() == {name: hashlib.sha256(FILES[name]).hexdigest() for name in found.files}


def test_a_pinned_commit_that_is_here_needs_no_hub(tiny: Any, monkeypatch: Any) -> None:
    first = source(REPO, revision=COMMIT)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert source(REPO, revision=COMMIT) == first


def test_a_branch_means_its_last_known_commit_while_the_hub_is_away(
    tiny: Any, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    first = source(REPO, revision="v1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert source(REPO, revision="v1") == first
    assert COMMIT in caplog.text
    with pytest.raises(DownloadError, match="cannot reach") as caught:
        source(REPO, revision="main")
    # A folder's name with a slip in it looks like a hub id.
    assert f"there is no folder {REPO} here" in str(caught.value.hint)


def test_the_command_line_says_that_an_older_commit_is_used(tiny: Any, cli: Any) -> None:
    source(REPO)
    ran = cli("export", REPO, "--no-receipt", "--out", "out", HF_ENDPOINT="http://127.0.0.1:9")
    warning = next(line for line in ran.stderr.splitlines() if line.startswith("warning: "))
    assert "cannot reach http://127.0.0.1:9" in warning and COMMIT in warning


def test_a_moved_branch_brings_the_new_commit(tiny: Any) -> None:
    source(REPO)
    moved = "beef" + "1" * 36
    tiny.branches["main"] = moved
    assert source(REPO).revision == moved


def test_a_cut_connection_goes_on_where_it_stopped(tiny: Any) -> None:
    tiny.cut_after["model.safetensors"] = [11 * MIB]
    assert source(REPO).hashes()["model.safetensors"]
    ranges = [asked for name, asked in tiny.asked if name == "model.safetensors"]
    assert ranges[0] is None
    assert ranges[1] == f"bytes={10 * MIB}-"


def test_a_download_that_gave_up_goes_on_in_the_next_run(tiny: Any) -> None:
    tiny.cut_after["model.safetensors"] = [11 * MIB] + [0] * 5
    with pytest.raises(DownloadError, match="cannot reach"):
        source(REPO)
    assert _snapshots() == [f"{COMMIT}.download"]
    tiny.asked.clear()
    found = source(REPO)
    assert tiny.asked == [("model.safetensors", f"bytes={10 * MIB}-")]
    assert (found.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert _snapshots() == [COMMIT, "refs"]


def test_a_server_that_ignores_range_still_gives_a_whole_file(tiny: Any) -> None:
    tiny.cut_after["model.safetensors"] = [11 * MIB]
    tiny.ignore_range = True
    found = source(REPO)
    assert (found.path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("wrong", ["flipped", "longer", "shorter"])
def test_wrong_bytes_are_refused_and_removed(tiny: Any, name: str, wrong: str) -> None:
    data = FILES[name]
    tiny.served[name] = {
        "flipped": data[:-1] + bytes([data[-1] ^ 1]),
        "longer": data + b"x",
        "shorter": data[:-1],
    }[wrong]
    with pytest.raises(ChecksumError, match=name):
        source(REPO)
    assert _snapshots() == [f"{COMMIT}.download"]
    left = _fs.home("cache") / "hub" / "acme--tiny" / f"{COMMIT}.download"
    assert not list(left.glob(f"{name}*"))
    tiny.served.clear()
    assert source(REPO).revision == COMMIT


def test_an_endless_answer_ends_at_the_announced_size(tiny: Any) -> None:
    tiny.served["config.json"] = b"x" * (64 * MIB)
    heard: list[int] = []
    with pytest.raises(ChecksumError):
        source(REPO, on_progress=lambda done, total: heard.append(done))
    assert max(heard) <= len(FILES["config.json"]) + 1


def test_an_unknown_revision_and_an_unknown_model_say_so(tiny: Any) -> None:
    with pytest.raises(DownloadError, match="no revision 'v2'"):
        source(REPO, revision="v2")
    with pytest.raises(DownloadError, match="acme/none"):
        source("acme/none")


def test_a_gated_model_asks_for_a_token_and_opens_with_it(tiny: Any, monkeypatch: Any) -> None:
    tiny.token = "hf_right"
    with pytest.raises(DownloadError, match="refuses access") as caught:
        source(REPO)
    assert "HF_TOKEN" in (caught.value.hint or "")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(DownloadError, match="refuses access"):
        source(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert source(REPO).revision == COMMIT


def test_a_hub_that_never_answers_ends_in_our_error(tiny: Any, monkeypatch: Any) -> None:
    tiny.silent_s = 3
    monkeypatch.setattr(hub, "_API_TIMEOUT_S", 0.2)
    with pytest.raises(DownloadError, match="cannot reach"):
        source(REPO)


def test_too_little_space_is_said_before_the_first_byte(tiny: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(_fs, "free_bytes", lambda _: 20 * MIB)
    with pytest.raises(OutOfSpaceError, match=r"20\.\d MB|21\.0 MB free"):
        source(REPO)
    assert tiny.asked == []


@pytest.mark.parametrize(
    "name", ["../../evil.json", "/etc/evil.json", "a/../../evil.json", "..\\evil.json", "a//b"]
)
def test_a_name_that_leaves_the_folder_is_refused(tiny: Any, name: str) -> None:
    tiny.names = [name]
    with pytest.raises(UnsafeModelError, match="unsafe name"):
        source(REPO)
    assert tiny.asked == []


def test_a_repository_with_pickles_only_is_refused_unfetched(tiny: Any) -> None:
    del tiny.files["model.safetensors"]
    with pytest.raises(UnsafeModelError, match="pickle"):
        source(REPO)
    assert tiny.asked == []


def test_a_listing_without_hashes_is_refused(tiny: Any) -> None:
    tiny.sizes["config.json"] = -1
    with pytest.raises(DownloadError, match="no size and hash"):
        source(REPO)


def test_progress_reaches_the_total(tiny: Any) -> None:
    heard: list[tuple[int, int]] = []
    source(REPO, on_progress=lambda done, total: heard.append((done, total)))
    total = sum(len(FILES[name]) for name in KEPT)
    assert heard[-1] == (total, total)
    assert heard == sorted(heard)


def test_two_downloads_of_one_commit_do_not_mix(tiny: Any) -> None:
    folder = _fs.home("cache") / "hub" / "acme--tiny"
    with (
        _fs.staged(folder / COMMIT, owns=lambda _: True),
        pytest.raises(UsageError, match="another edgekit"),
    ):
        source(REPO)


def test_nothing_is_printed(tiny: Any, capfd: pytest.CaptureFixture[str]) -> None:
    source(REPO)
    assert capfd.readouterr() == ("", "")


def test_a_plan_fetches_the_config_alone_and_keeps_nothing(tiny: Any) -> None:
    sizes = planned_gguf.CONFIG
    tiny.files["config.json"] = json.dumps(sizes).encode()
    found = plan(REPO, "rpi5")
    assert found.parameters == planned_gguf.header().parameters
    assert {name for name, _ in tiny.asked} == {"config.json"}
    assert _snapshots() == []


@pytest.mark.parametrize("spec", ["org", "a/b/c", "../b", "a/..", "org/na me", "-a/b", "a/b--c"])
def test_what_is_no_hub_id_never_reaches_the_hub(tiny: Any, spec: str) -> None:
    with pytest.raises(SourceError):
        source(spec)
    assert tiny.asked == []


def test_without_the_package_the_extra_is_named(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError) as caught:
        source(REPO)
    assert "[export]" in str(getattr(caught.value, "hint", ""))
