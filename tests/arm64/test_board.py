"""From a bare arm64 board to an answer and a report, on the core of each Raspberry Pi."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import arm64_board
import pytest
import tiny_torch

import edgekit
from edgekit import device_setup, remote, remote_tensors, wheelhouse
from edgekit.errors import DeviceError
from edgekit.exporter import export
from edgekit.runtime import GenerateParams
from edgekit.target import Target, open_target
from edgekit.wheelhouse import Wheelhouse

pytestmark = [pytest.mark.arm64, pytest.mark.timeout(1200)]
# The fast path of each board's core: dotprod and fp16 on a Pi 5, plain NEON on the others.
BACKENDS = {"rpi5": "armv8.2_2", "rpi4": "armv8.0_1", "rpi-zero2w": "armv8.0_1"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with arm64_board.unpacked(tmp_path_factory.mktemp("root")) as folder:
        yield folder


@pytest.fixture(scope="module")
def wheels() -> Wheelhouse:
    """What scripts/build made for boards of this architecture."""
    folder = os.environ.get("EDGEKIT_TEST_WHEELHOUSE")
    if not folder:
        pytest.skip("there are no wheels for a board: run scripts/test-arm64")
    return wheelhouse.read(Path(folder))


@pytest.fixture
def board(
    request: pytest.FixtureRequest, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Target]:
    """A connection to a bare board of the kind that the test names."""
    with (
        arm64_board.board(request.param, tmp_path, root, monkeypatch),
        open_target("board") as target,
    ):
        yield target


@pytest.mark.parametrize(("board", "name"), [(n, n) for n in BACKENDS], indirect=["board"])
def test_a_bare_board_is_set_up_and_answers_with_its_fast_path(
    board: Target, name: str, wheels: Wheelhouse, smollm2_gguf: Path, tmp_path: Path
) -> None:
    facts = board.identify()
    assert facts.board == arm64_board.KINDS[name].model
    assert (facts.architecture, facts.emulated, facts.edgekit) == ("aarch64", True, None)

    done = device_setup.setup(board, wheels)
    assert done.backend == BACKENDS[name]
    assert not [warning for warning in done.warnings if "llama.cpp" in warning]

    params = GenerateParams(max_tokens=4, temperature=0)
    said: list[str] = []
    answer = remote.run_on(
        board,
        smollm2_gguf,
        "The capital of France is",
        params=params,
        fields={"n_threads": 1},
        raw=True,
        on_piece=said.append,
    )
    assert "".join(said) == answer.text and "Paris" in answer.text

    device_setup.remove(board)
    assert not Path(facts.home).exists()


def test_a_board_with_trixie_and_python_3_13_is_set_up_and_answers(
    wheels: Wheelhouse,
    smollm2_gguf: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        arm64_board.unpacked(tmp_path_factory.mktemp("trixie"), "trixie") as root,
        arm64_board.board("rpi5", tmp_path_factory.mktemp("board"), root, monkeypatch),
        open_target("board") as board,
    ):
        facts = board.identify()
        assert facts.python.startswith("3.13.") and "trixie" in facts.os
        assert device_setup.setup(board, wheels).backend == BACKENDS["rpi5"]
        params = GenerateParams(max_tokens=4, temperature=0)
        answer = remote.run_on(
            board,
            smollm2_gguf,
            "The capital of France is",
            params=params,
            fields={"n_threads": 1},
            raw=True,
            on_piece=lambda piece: None,
        )
        assert "Paris" in answer.text


@pytest.mark.parametrize("board", ["rpi5"], indirect=True)
def test_an_onnx_model_answers_and_is_measured_on_a_board(
    board: Target, wheels: Wheelhouse, tmp_path: Path
) -> None:
    tiny_torch.bert_folder(tmp_path / "source")
    model = export(tmp_path / "source", "onnx", type="F32", out=tmp_path / "m", receipt=False).path
    with edgekit.load(model, n_threads=1) as session:
        here = session.embed("a word")
    device_setup.setup(board, wheels)
    found = remote_tensors.answer_on(board, model, "a word", top=1, n_threads=1)
    assert found.vector == pytest.approx(here, abs=1e-4)
    how = {"threads": [1], "repetitions": 1, "probe_limits": False}
    report = remote_tensors.latency_on(board, model, **how)
    assert report.machine.emulated and any("emulated" in remark for remark in report.remarks)
    assert report.rows[0].model == "m"


@pytest.mark.parametrize("board", ["rpi5"], indirect=True)
def test_a_report_from_an_emulated_board_says_so(
    board: Target, wheels: Wheelhouse, smollm2_gguf: Path
) -> None:
    device_setup.setup(board, wheels)
    report = remote.bench_on(
        board,
        smollm2_gguf,
        probe=False,
        threads=(1,),
        prompts=(4,),
        answers=(2,),
        repetitions=1,
        sessions=False,
    )
    assert report.device == "board"
    assert any("emulated" in remark for remark in report.remarks)
    assert report.machine.board == arm64_board.KINDS["rpi5"].model
    assert report.engine.backend == "libggml-cpu-armv8.2_2.so"
    assert report.rows


@pytest.mark.parametrize("board", ["rpi4"], indirect=True)
def test_an_interrupted_setup_goes_on_where_it_stopped(board: Target, wheels: Wheelhouse) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.startswith("upload") and done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device_setup.setup(board, wheels, progress=interrupt)
    board.close()
    with open_target("board") as again:
        done = device_setup.setup(again, wheels)
        assert done.sent_bytes < 0.6 * done.upload_bytes
        assert done.backend == BACKENDS["rpi4"]


@pytest.mark.parametrize("board", ["rpi4"], indirect=True)
def test_wheels_of_another_architecture_never_leave_this_machine(
    board: Target, wheels: Wheelhouse, tmp_path: Path
) -> None:
    index = json.loads((wheels.folder / wheelhouse.INDEX).read_text())
    (tmp_path / wheelhouse.INDEX).write_text(json.dumps(index | {"architecture": "x86_64"}))
    with pytest.raises(DeviceError, match="are for x86_64"):
        device_setup.setup(board, wheelhouse.read(tmp_path))
    assert board.sent_bytes == 0
