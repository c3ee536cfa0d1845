"""Models without tokens on a board behind a real sshd: the same answers, the same bench."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import sshd
import tiny_torch
from PIL import Image

import edgekit
from edgekit import remote_tensors, tune
from edgekit.artifact import Artifact
from edgekit.errors import EdgekitError, GateError, RemoteCommandError, UsageError
from edgekit.exporter import export
from edgekit.receipt import Gates
from edgekit.target import Local, open_target

_PI5 = {
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0b\n" * 4,
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    "proc/meminfo": "MemTotal: 8244944 kB\nMemAvailable: 7000000 kB\n",
}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Board]:
    folder = tmp_path_factory.mktemp("board")
    for name, text in _PI5.items():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tree" / name).write_text(text)
    with (
        pytest.MonkeyPatch.context() as patch,
        sshd.board(folder, patch, EDGEKIT_SYSROOT=f"{folder}/tree") as made,
    ):
        yield made


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of images."""
    folder = tmp_path_factory.mktemp("vit")
    tiny_torch.vit_folder(folder / "source")
    export(folder / "source", "onnx", type="F32", out=folder / "vit", receipt=False)
    return folder / "vit"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of texts."""
    folder = tmp_path_factory.mktemp("bert")
    tiny_torch.bert_folder(folder / "source")
    export(folder / "source", "onnx", type="F32", out=folder / "bert", receipt=False)
    return folder / "bert"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).convert("RGB").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_board_classifies_an_image_as_this_machine_does_and_keeps_no_copy(
    board: sshd.Board, cli: Callable[..., Any], vit: Path, photo: Path
) -> None:
    here = cli("run", vit, photo, "--top", "3", "--json")
    there = cli("run", vit, photo, "--top", "3", "--json", "--device", "board")
    assert there.code == 0, there.stderr
    assert len(json.loads(here.stdout)["classes"]) == 3
    assert json.loads(there.stdout) == json.loads(here.stdout)
    kept = [path.read_bytes() for path in (board.home / "blobs").iterdir()]
    assert kept and photo.read_bytes() not in kept


def test_a_board_makes_the_vector_of_a_text_that_this_machine_makes(
    board: sshd.Board, bert: Path
) -> None:
    with edgekit.load(bert, n_threads=1) as session:
        here = session.embed("$(id) and `id`")
    with open_target("board") as there:
        found = remote_tensors.answer_on(there, bert, "$(id) and `id`", top=1, n_threads=1)
    assert found.classes is None and found.vector == pytest.approx(here, abs=1e-6)


def test_a_bench_on_a_board_is_the_same_bench(
    board: sshd.Board, cli: Callable[..., Any], vit: Path, tmp_path: Path
) -> None:
    words = ("-r", "1", "-t", "1", "--batch", "1,2", "--no-probe", "--profile", "--out", "r.json")
    done = cli("bench", vit, "--device", "board", *words)
    assert done.code == 0, done.stderr
    body = json.loads((tmp_path / "r.json").read_text())
    assert (body["device"], body["machine"]["board"]) == (
        "board",
        "Raspberry Pi 5 Model B Rev 1.0",
    )
    assert [(row["model"], row["batch"]) for row in body["rows"]] == [("vit", 1), ("vit", 2)]
    assert all(len(row["turns_ms"][0]) >= 3 for row in body["rows"])
    assert sum(row["share"] for row in body["operators"]) == pytest.approx(1)
    assert "upload to board" in done.stderr and "MultiHeadAttention" in done.stdout
    assert sshd.eventually(lambda: not sshd.processes_with(f"{board.home}/venv/bin/python"))


@pytest.mark.slow
def test_an_export_is_optimized_for_a_board(
    board: sshd.Board, cli: Callable[..., Any], vit: Path, tmp_path: Path
) -> None:
    source = vit.parent / "source"
    words = ("--format", "onnx", "--min-cosine", "0.5", "--device", "board", "--json")
    done = cli("export", source, *words)
    assert done.code == 2 and "--optimize-for" in done.stderr
    done = cli("export", source, "--optimize-for", "latency", *words, "--out", tmp_path / "out")
    assert done.code == 0, done.stderr
    tuning = json.loads(done.stdout)["receipt"]["tuning"]
    assert tuning["device"] == "board" and {each["runtime"] for each in tuning["variants"]} == {
        "ort"
    }
    assert {"F32", "static_wi8_ai8"} <= {each["type"] for each in tuning["variants"]}
    assert tuning["cpu"] == "Cortex-A76"
    passes = Artifact.open(tmp_path / "out").manifest
    # Which ones stay was decided there: nothing of it was measured here, and all can be named.
    assert not passes.receipt.get("fusion") and passes.recipe.fusion != "auto"


@pytest.mark.slow
def test_a_gate_on_speed_is_one_on_the_times_of_the_board(
    board: sshd.Board, vit: Path, tmp_path: Path
) -> None:
    gates = Gates(min_speed_ratio=1000)
    with pytest.raises(GateError, match="the speed of float"):
        tune.tune(vit.parent / "source", "size", out=tmp_path, gates=gates, device="board")


@pytest.mark.slow
def test_a_bare_file_brings_the_files_that_it_needs(
    board: sshd.Board, bert: Path, tmp_path: Path
) -> None:
    graph = onnx.load(str(bert / "model.onnx"))
    where = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    onnx.save(graph, str(tmp_path / "m.onnx"), **where)
    for name in ("preprocess.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((bert / name).read_bytes())
    (tmp_path / "secret.txt").write_text("of somebody else")
    with edgekit.load(tmp_path / "m.onnx", n_threads=1) as session:
        here = session.embed("a word")
    with open_target("board") as there:
        found = remote_tensors.answer_on(there, tmp_path / "m.onnx", "a word", top=1, n_threads=1)
        report = remote_tensors.latency_on(
            there, tmp_path / "m.onnx", threads=[1], repetitions=1, probe_limits=False
        )
    assert found.vector == pytest.approx(here, abs=1e-6)
    assert report.rows[0].model == "m.onnx"
    kept = [path.read_bytes() for path in (board.home / "blobs").iterdir()]
    assert b"of somebody else" not in kept


@pytest.mark.slow
def test_several_devices_and_one_that_is_off(
    board: sshd.Board, cli: Callable[..., Any], vit: Path, tmp_path: Path
) -> None:
    with (board.folder / "config").open("a") as config:
        config.write("Host off\nHostName 127.0.0.1\nPort 1\n")
    words = ("-r", "1", "-t", "1", "--no-probe", "--out", "r.csv")
    done = cli("bench", vit, "--device", "board,off,local", *words)
    assert done.code == 8 and "off: no connection to off" in done.stderr
    assert (tmp_path / "r-board.csv").exists() and (tmp_path / "r-local.csv").exists()


def test_what_cannot_be_is_told_before_a_device_is_called(
    vit: Path, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 100)
    with Local() as here:
        with pytest.raises(UsageError, match="cannot be read"):
            remote_tensors.answer_on(here, vit, str(tmp_path / "none.png"), top=1)
        with pytest.raises(EdgekitError, match=r"broken\.onnx"):
            remote_tensors.latency_on(here, tmp_path / "broken.onnx")
        with pytest.raises(UsageError, match="which model"):
            remote_tensors.latency_on(here)


@pytest.mark.parametrize(
    "answer",
    [
        *({}, [], None, {"classes": [["a", 2]]}, {"classes": [["\x1b[2J", 0.5]]}),
        *({"vector": [float("nan")]}, {"vector": "x"}, {"vector": [1], "more": 1}),
    ],
    ids=range(8),
)
def test_nonsense_from_a_board_is_an_error_of_ours(answer: Any) -> None:
    with Local() as here, pytest.raises(RemoteCommandError, match="an answer that is none"):
        remote_tensors._answer(here, answer)
