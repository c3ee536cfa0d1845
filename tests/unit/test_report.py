"""A report comes back from JSON as it was, and nothing else passes for one."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reports

from edgekit import bench_files, report, report_text
from edgekit.errors import EdgekitError, UsageError, VersionError


def _parse(body: Any) -> report.BenchReport:
    return report.parse(json.dumps(body).encode(), origin="r.json")


def test_a_report_survives_json() -> None:
    found = reports.made()
    assert report.parse(found.to_json(), origin="r.json") == found


def test_the_summary_in_json_is_for_readers_and_not_believed() -> None:
    body = reports.made().to_dict()
    assert body["rows"][0]["summary"]["test"] == "pp512"
    body["rows"][0]["summary"] = {"tok_s": 1e9}
    assert _parse(body) == reports.made()


def test_a_row_counts_like_llama_bench() -> None:
    row = reports.row(n_prompt=0, n_gen=10, n_seqs=2, samples_s=(1.0, 2.0), step_ms=(1.0, 2.0, 5.0))
    assert row.test == "tg10 x 2"
    assert row.tok_s == pytest.approx((20 + 10) / 2)  # the mean of speeds, not of times
    assert row.tok_s_sd == pytest.approx(7.0711, rel=1e-4)
    assert row.ms_per_token(50) == 2.0
    assert row.ms_per_token(95) == pytest.approx(4.7)


def test_an_outlier_is_flagged_and_still_counts() -> None:
    row = reports.row(samples_s=(1.0, 1.01, 0.99, 1.0, 3.0))
    assert row.outliers == [4]
    assert row.tok_s < 0.95 * 512
    assert reports.row(samples_s=(1.0, 1.01, 0.99, 1.02, 0.98)).outliers == []


def _drop_a_key(body: dict[str, Any]) -> None:
    del body["rows"][0]["n_gen"]


def _add_a_key(body: dict[str, Any]) -> None:
    body["machine"]["host"] = "secret"


_BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a missing key": (_drop_a_key, "the report.rows[0] lacks 'n_gen'"),
    "a strange key": (_add_a_key, "unknown key 'host'"),
    "text for a number": (lambda b: b["rows"][0].update(n_gen="8"), "n_gen must be a whole number"),
    "true for a number": (lambda b: b["rows"][0].update(n_threads=True), "a whole number"),
    "no samples": (lambda b: b["rows"][0].update(samples_s=[]), "needs samples"),
    "time backwards": (lambda b: b["rows"][0].update(samples_s=[-1.0]), "times that can be"),
    "a time near zero": (lambda b: b["rows"][0].update(samples_s=[1e-320]), "times that can be"),
    "a prompt and an answer": (lambda b: b["rows"][0].update(n_gen=8), "either"),
    "a stranger's model": (lambda b: b["rows"][0].update(model="other"), "does not list"),
    "control characters": (lambda b: b.update(edgekit="\x1b[2J"), "printable"),
    "no rows": (lambda b: b.update(rows=[]), "needs rows"),
    "a list for an object": (
        lambda b: b.update(machine=[]),
        "the report.machine must be an object",
    ),
    "another kind": (lambda b: b.update(kind="manifest"), "is no report of edgekit bench"),
    "a strange schema": (lambda b: b.update(schema="1"), "its schema is"),
}


@pytest.mark.parametrize(("spoil", "words"), _BAD.values(), ids=_BAD.keys())
def test_what_is_no_report_is_refused_in_one_line(
    spoil: Callable[[dict[str, Any]], Any], words: str
) -> None:
    body = reports.made().to_dict()
    spoil(body)
    with pytest.raises(UsageError) as caught:
        _parse(body)
    assert words in caught.value.message and "\n" not in caught.value.message


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"a": NaN}'])
def test_bytes_that_are_no_json_object_are_refused(raw: bytes) -> None:
    with pytest.raises(UsageError):
        report.parse(raw, origin="r.json")


def test_a_mutant_report_is_a_report_or_one_of_our_errors() -> None:
    """Any value of it replaced by any other: no foreign exception, and what is read prints."""
    draw = random.Random(0)
    odd = [None, True, -1, 0, 1 << 70, 1e308, 5e-324, "", "\x00", "x" * 999, [], [[]], {}, {"a": 1}]
    for _ in range(400):
        body = reports.made().to_dict()
        place: Any = body
        while True:
            key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or not place[key] or draw.random() < 0.2:
                break
            place = place[key]
        place[key] = draw.choice(odd)
        try:
            found = _parse(body)
        except EdgekitError:
            continue
        assert found.to_json() and report_text.markdown(found) and report_text.as_csv(found)


def test_a_newer_report_asks_for_a_newer_edgekit() -> None:
    with pytest.raises(VersionError, match="schema 3"):
        _parse(reports.made().to_dict() | {"schema": 3})


def test_a_report_from_before_devices_had_names_is_still_read() -> None:
    body = reports.made().to_dict() | {"schema": 1}
    for key in ("device", "moments", "profile"):
        del body[key]
    del body["machine"]["emulated"]
    for row in body["rows"]:
        del row["throttled_s"], row["predicted_tok_s"]
    assert _parse(body) == replace(reports.made(), device=None, moments=(), profile=None)


def test_a_report_says_its_device_and_what_it_felt() -> None:
    told = dict(report_text.machine_lines(reports.made()))
    assert told["device"] == "kitchen"
    assert told["temperature during it"] == "48.5 to 61.0 °C"
    assert told["clock during it"] == "1,500 to 2,400 MHz"
    assert told["power during it"] == "3.1 to 8.9 W, 6.00 W on average"
    assert told["throttled"] == "1 of 2 s: throttled"
    assert "waited for memory during it" not in told, "nobody waited"


def test_an_emulated_board_is_marked_wherever_its_figures_stand() -> None:
    found = reports.made()
    found = replace(found, machine=replace(found.machine, emulated=True))
    assert "say nothing of a real board" in report_text.markdown(found)
    assert report_text.side_by_side({"qemu": found})[1][0][0] == "qemu (emulated)"
    assert "True" in report_text.as_csv(found).splitlines()[1]


def test_a_prediction_stands_beside_what_was_measured() -> None:
    found = reports.made(predicted_tok_s=(800.0, 1000.0, 1250.0))
    head, cells = report_text.head(found), report_text.cells(found)
    assert cells[0][head.index("predicted")] == "1000 (+2%)"
    with pytest.raises(UsageError, match="low, mid and high"):
        reports.row(predicted_tok_s=(1.0,))


def test_devices_side_by_side_make_one_table() -> None:
    fast, slow = reports.made(), reports.made(throttled=True)
    head, lines = report_text.side_by_side({"rpi5": fast, "rpi4": slow})
    assert head[0] == "device"
    assert [line[0] for line in lines] == ["rpi5", "rpi5", "rpi4 (throttled)", "rpi4 (throttled)"]
    assert {len(line) for line in lines} == {len(head)}


def test_no_report_larger_than_the_limit_is_read(tmp_path: Path) -> None:
    large = tmp_path / "r.json"
    with large.open("wb") as file:
        file.truncate(report._MAX_BYTES + 1)
    with pytest.raises(EdgekitError, match="more than"):
        report.read(large)


def test_every_form_of_file_holds_every_row(tmp_path: Path) -> None:
    found = reports.made()
    for name in ("r.json", "r.csv", "r.md"):
        bench_files.write(found, tmp_path / name)
    assert report.read(tmp_path / "r.json") == found
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert [float(row["tok_s"]) for row in rows] == [row.tok_s for row in found.rows]
    text = (tmp_path / "r.md").read_text()
    assert all(f"| {row.test} |" in text for row in found.rows)
    assert found.models[0].sha256 in text and "no energy counter" in text


def test_a_file_of_unknown_form_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        bench_files.check(tmp_path / "report.pdf")


def test_a_spreadsheet_runs_no_name_as_a_formula() -> None:
    found = reports.made(name="=cmd()")
    first = next(csv.DictReader(io.StringIO(report_text.as_csv(found))))
    assert first["model"] == "'=cmd()"


def test_a_busy_and_a_throttled_run_say_so() -> None:
    quiet = reports.made()
    assert quiet.busy is None and not quiet.throttled
    busy = reports.made(others_share=0.4, steal_share=0.2)
    assert busy.busy is not None and "40%" in busy.busy and "20%" in busy.busy
    assert reports.made(throttled=True).throttled


_SWEEPS = {
    "one row": (reports.row(),),
    "two models": (reports.row(), reports.answer()),
    "threads": tuple(reports.answer(n_threads=n) for n in (1, 2, 4)),
    "batches and caches": tuple(
        reports.answer(n_seqs=n, kv_type=kv) for n in (1, 4) for kv in ("f16", "q8_0")
    ),
}


@pytest.mark.parametrize("rows", _SWEEPS.values(), ids=_SWEEPS.keys())
def test_every_sweep_makes_a_picture_that_repeats(
    rows: tuple[report.BenchRow, ...], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    found = replace(reports.made(), rows=rows)
    for name in ("p.svg", "again.svg", "p.png"):
        bench_files.write(found, tmp_path / name)
    picture = (tmp_path / "p.svg").read_bytes()
    assert picture == (tmp_path / "again.svg").read_bytes()
    assert picture.count(b"<path") > 40
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_shown_with_three_digits_that_count() -> None:
    assert [report_text.figure(x) for x in (0.01234, 1.234, 12.34, 1234.5, 0)] == [
        *("0.0123", "1.23", "12.3", "1234", "0")
    ]
    assert (
        report_text.figure(0.5, beside=150.0) == "0" and report_text.figure(5, beside=15) == "5.0"
    )
