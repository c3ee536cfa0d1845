"""edgekit bench on the real SmolLM2: figures, files, comparisons, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reports
import tiny

import edgekit
from edgekit import report
from edgekit.bench_plan import Sweep, settings_of, sweep_like
from edgekit.bench_side import EngineSide
from edgekit.bench_worker import _Child
from edgekit.errors import UsageError
from edgekit.page_cache import drop_from_page_cache, share_in_page_cache
from edgekit.registry import RUNTIMES

TINY = ("-t", "1", "-p", "16", "-n", "8", "-r", "2", "--no-probe")


@pytest.fixture(scope="module")
def measured(smollm2_gguf: Path) -> report.BenchReport:
    """Two cache types, two batches, with a session: what a small sweep makes."""
    return edgekit.bench(
        smollm2_gguf,
        probe=False,
        threads=(1,),
        prompts=(16,),
        answers=(8,),
        depths=(0, 16),
        kv_types=("f16", "q8_0"),
        batches=(1, 2),
        repetitions=2,
    )


def test_every_combination_is_a_row(measured: report.BenchReport) -> None:
    tests = [(row.test, row.kv_type) for row in measured.rows]
    expected = ["pp16", "tg8", "tg8 @ d16", "tg8 x 2", "tg8 @ d16 x 2"]
    assert sorted(tests) == sorted((test, kv) for test in expected for kv in ("f16", "q8_0"))
    for row in measured.rows:
        assert len(row.samples_s) == 2
        assert len(row.step_ms) == (16 if row.n_gen else 0)
        assert row.tok_s > 1 and row.ms_per_token(99) >= row.ms_per_token(50) > 0
        assert row.peak_rss_bytes is not None and row.peak_rss_bytes > row.size_bytes / 2


def test_a_report_says_what_it_was_taken_on(measured: report.BenchReport) -> None:
    assert measured.engine.version and measured.machine.cores >= 1
    assert len(measured.models[0].sha256) == 64
    assert report.parse(measured.to_json(), origin="r") == measured


def test_the_session_s_figures_stand_beside_the_engine_s(measured: report.BenchReport) -> None:
    (session,) = measured.sessions
    assert session.warm_load_s > 0 and len(session.ttft_s) == 2
    assert (session.cold_load_s is None) == (session.cold_note is not None)
    assert 14 <= session.prompt_tokens <= 18
    assert session.decode_tokens == 8 and len(session.decode_tok_s) == 2


def test_an_artifact_is_measured_with_the_threads_of_a_load_unless_told(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    artifact = edgekit.export(
        tiny_model("tinyllama"), type="F16", out=tmp_path / "art", receipt=False
    )
    stages: dict[str, tuple[int, int]] = {}
    found = edgekit.bench(
        artifact,
        probe=False,
        progress=lambda stage, done, total: stages.update({stage: (done, total)}),
        prompts=(8,),
        answers=(8,),
        repetitions=1,
    )
    assert list(stages) == ["hash art", "load", "warm up", "measure"]
    assert all(done == total for done, total in stages.values())
    assert [model.name for model in found.models] == ["art"]
    assert found.models[0].type == "F16" and found.models[0].sha256 in {
        file.sha256 for file in artifact.manifest.files
    }
    decode = next(row for row in found.rows if row.n_gen)
    assert decode.n_threads == found.sessions[0].n_threads
    assert 1 <= decode.n_threads <= found.machine.usable_cores


def test_the_steps_of_a_decode_make_up_its_time(smollm2_gguf: Path) -> None:
    runtime = RUNTIMES.load("llamacpp")()
    with runtime.bencher(smollm2_gguf, n_ctx=128, threads=1, n_seqs=2) as bencher:
        bencher.stand_at(8)
        started = time.perf_counter()
        steps = bencher.decode(8, 8)
        wall_s = time.perf_counter() - started
        assert len(steps) == 8
        assert sum(steps) == pytest.approx(wall_s, rel=0.05)
        assert bencher.prefill(32) > 0
        with pytest.raises(UsageError, match="need n_ctx"):
            bencher.decode(64, 8)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_loops_run_every_family(name: str, tiny_gguf: Callable[[str], Path]) -> None:
    """A second decode at the same depth goes back there, whatever the family's cache is like."""
    with RUNTIMES.load("llamacpp")().bencher(
        tiny_gguf(name), n_ctx=64, threads=1, n_seqs=2, n_batch=8
    ) as bencher:
        assert bencher.prefill(12) > 0
        for depth in (12, 12, 0):
            assert len(bencher.decode(4, depth)) == 4


def test_a_file_leaves_the_page_cache_or_the_reason_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with file.open("wb") as out:
        out.write(os.urandom(1 << 20))
    file.read_bytes()
    with file.open("rb") as opened:
        assert share_in_page_cache(opened.fileno()) == 1
        # Whether the kernel lets go of it may change from call to call.
        reason = drop_from_page_cache(file)
        cached = share_in_page_cache(opened.fileno())
        assert (reason is None) == (cached == 0)


def test_idle_children_sleep_until_their_next_turn(smollm2_gguf: Path) -> None:
    """The engine's threads spin after work; a child that rests must not take a core from others."""
    child = _Child()
    child.hold(str(smollm2_gguf), {"n_ctx": 64, "threads": 2})
    child.decode(2, 0)
    assert child.rest()
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_a_hot_pi_with_little_memory_says_so(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree of files plays the board; the engine runs here."""
    files = {
        "proc/cpuinfo": "".join(
            f"processor\t: {n}\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd0b\n" for n in range(4)
        ),
        "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        "proc/meminfo": "MemTotal: 500000 kB\nMemAvailable: 100000 kB\n",
        "proc/loadavg": "0.10 0.10 0.10 1/100 999\n",
        "sys/class/thermal/thermal_zone0/temp": "84250\n",
        "sys/devices/platform/soc/soc:firmware/get_throttled": "80008\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("EDGEKIT_SYSROOT", str(tmp_path))
    sweep: dict[str, Any] = {"threads": (1,), "prompts": (), "answers": (8,), "repetitions": 2}
    found = edgekit.bench(smollm2_gguf, probe=False, sessions=False, **sweep)
    assert (found.machine.board, found.machine.cpu) == (
        "Raspberry Pi 5 Model B Rev 1.0",
        "Cortex-A76",
    )
    assert found.before.temperature_c == 84.25
    assert found.throttled and found.rows[0].throttled
    remarks = "\n".join(found.remarks)
    assert "throttled" in remarks and "soft temperature limit" in remarks
    assert "each repetition loaded its model again" in remarks
    assert found.rows[0].energy_j is None and "no energy counter" in (found.energy_note or "")


def test_repetitions_in_which_the_flag_was_up_are_left_out(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled"
    flag.parent.mkdir(parents=True)
    flag.write_text("0\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 7000000 kB\n")
    monkeypatch.setenv("EDGEKIT_SYSROOT", str(tmp_path))
    turns = 0
    real = EngineSide.take_turn

    def take_turn(self: EngineSide) -> None:
        nonlocal turns
        turns += 1
        if turns == 3:
            time.sleep(1.5)  # longer than between two looks: the first two turns are not near
            flag.write_text("4\n")
            time.sleep(2.5)  # and a look comes before the run ends
        real(self)

    monkeypatch.setattr(EngineSide, "take_turn", take_turn)
    sweep: dict[str, Any] = {"threads": (1,), "prompts": (), "answers": (8,), "repetitions": 4}
    found = edgekit.bench(smollm2_gguf, probe=False, sessions=False, **sweep)
    (row,) = found.rows
    assert (len(row.samples_s), len(row.throttled_s), row.throttled) == (2, 2, True)
    assert len(row.step_ms) == 2 * 8
    assert any("2 repetitions are left out" in remark for remark in found.remarks)
    assert any(moment.throttling for moment in found.moments)


def test_the_command_prints_a_table_and_writes_every_form(
    smollm2_gguf: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    outs = [f"r.{form}" for form in ("json", "csv", "md")]
    done = cli("bench", smollm2_gguf, *TINY, *(word for out in outs for word in ("--out", out)))
    assert done.code == 0, done.stderr
    assert "pp16" in done.stdout and "tg8" in done.stdout and "TTFT" in done.stdout
    assert "processor" in done.stdout and "load cold" in done.stdout
    for out in outs:
        assert (tmp_path / out).stat().st_size > 100
    assert report.read(tmp_path / "r.json").rows


def test_two_models_are_compared_in_pairs(smollm2_gguf: Path, cli: Callable[..., Any]) -> None:
    tiny = (*TINY[:-1], "--no-session", "--json", "--fail-if-slower", "99%")
    done = cli("bench", "--compare", smollm2_gguf, smollm2_gguf, *tiny)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)["comparison"]
    assert found["paired"] is True
    assert [row["label"] for row in found["rows"]] == ["pp16 -t 1 kv f16", "tg8 -t 1 kv f16"]


def test_a_slower_report_fails_the_gate_with_exit_code_6(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    before = reports.made()
    slow = [replace(row, samples_s=tuple(2 * s for s in row.samples_s)) for row in before.rows]
    for name, found in (("a.json", before), ("b.json", replace(before, rows=tuple(slow)))):
        with (tmp_path / name).open("wb") as out:
            out.write(found.to_json())
    done = cli("bench", "--compare", "a.json", "b.json", "--fail-if-slower", "5%")
    assert done.code == 6
    assert "slower" in done.stdout and "allowed are 5.0%" in done.stderr
    assert cli("bench", "--compare", "b.json", "a.json", "--fail-if-slower", "5%").code == 0


def test_a_report_of_another_machine_is_refused_before_anything_is_measured(
    smollm2_gguf: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    with (tmp_path / "pi.json").open("wb") as out:
        out.write(reports.made().to_json())
    done = cli("bench", "--compare", "pi.json", smollm2_gguf)
    assert done.code == 2
    assert "error: not comparable: other machine (cpu: Cortex-A76 and" in done.stderr
    assert "measure" not in done.stderr.partition("hint")[0]


_BAD = {
    "no model": ([], 2, "which model?"),
    "no file": (["none.gguf"], 5, "none.gguf"),
    "no list": (["m.gguf", "-t", "two"], 2, "is no list"),
    "no threads": (["m.gguf", "-t", "0"], 2, "threads takes whole numbers"),
    "twice": (["m.gguf", "-t", "1,1"], 2, "names a value twice"),
    "nothing": (["m.gguf", "-p", "0", "-n", "0"], 2, "nothing to measure"),
    "a cache type": (["m.gguf", "--kv", "f17"], 2, "unknown"),
    "a picture of no kind": (["m.gguf", "--out", "r.gif"], 2, "cannot write r.gif"),
    "no limit": (["--compare", "a.json", "b.json", "--fail-if-slower", "lots"], 2, "no share"),
    "a limit alone": (["m.gguf", "--fail-if-slower", "5%"], 2, "needs --compare"),
    "no report": (["--compare", "no.json", "no.json"], 4, "no.json"),
    "no folder": (["m.gguf", "--out", "/dev/null/r.md"], 2, "no folder to write to"),
    "three sides": (["m.gguf", "--compare", "a.json", "b.json"], 2, "leave out"),
}


@pytest.mark.parametrize(("words", "code", "text"), _BAD.values(), ids=_BAD.keys())
def test_a_bad_call_is_one_line_and_an_exit_code(
    words: list[str], code: int, text: str, cli: Callable[..., Any]
) -> None:
    done = cli("bench", *words)
    assert done.code == code
    assert text in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


def test_a_context_beyond_the_model_s_is_refused(
    smollm2_gguf: Path, cli: Callable[..., Any]
) -> None:
    done = cli("bench", smollm2_gguf, *TINY[:-1], "-d", "9000", "--no-probe", "--no-session")
    assert done.code == 2
    assert "trained for 8192" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_all_its_children(
    number: signal.Signals, smollm2_gguf: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "edgekit", "bench", str(smollm2_gguf), "-t", "1"),
            *("-n", "4096", "-r", "50", "--no-probe", "--no-session"),
        ],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("measure"):
            break
    children = _children(process.pid)
    assert children
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    assert time.monotonic() - started < 5
    process.stderr.close()
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def _children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def test_threads_for_decode_and_for_prefill_may_differ() -> None:
    found = settings_of(Sweep(batches=(1, 4)), automatic=(1, 2))
    shapes = [(s.n_threads, s.n_seqs, [(t.n_prompt, t.n_gen) for t in s.tests]) for s in found]
    assert shapes == [(1, 1, [(0, 128)]), (1, 4, [(0, 128)]), (2, 1, [(512, 0)])]
    assert [setting.n_ctx for setting in found] == [128, 512, 512]


def test_a_report_can_be_measured_again_with_its_own_settings() -> None:
    sweep = Sweep(**sweep_like(reports.made()))
    assert (sweep.threads, sweep.prompts, sweep.answers) == ((2,), (512,), (4,))
