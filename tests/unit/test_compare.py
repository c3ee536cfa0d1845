"""A difference is real only where its interval says so; what cannot be compared is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import reports

from edgekit import compare
from edgekit.errors import GateError, UsageError
from edgekit.report import BenchReport, ModelFacts

NAMES = ("before", "after")


def _only(seconds: tuple[float, ...], **fields: Any) -> BenchReport:
    """A report of one row."""
    found = reports.made()
    return replace(found, rows=(reports.row(samples_s=seconds, **fields),), sessions=())


def _together(a: tuple[float, ...], b: tuple[float, ...]) -> BenchReport:
    found = reports.made()
    second = ModelFacts("b.gguf", "cd" * 32, 80_000_000, "Q8_0", "llama", 134_515_008)
    return replace(
        found,
        models=(*found.models, second),
        rows=(reports.row(samples_s=a), reports.row("b.gguf", samples_s=b)),
        sessions=(),
    )


def _noisy(mean: float, spread: float, count: int, seed: int = 0) -> tuple[float, ...]:
    draw = random.Random(seed)
    return tuple(mean * (1 + draw.gauss(0, spread)) for _ in range(count))


def test_pairs_show_a_difference_that_is_smaller_than_the_drift_both_felt() -> None:
    drift = [1.0, 1.5, 1.1, 2.0, 1.3, 1.7]
    wobble = [1.0, 1.004, 0.997, 1.002, 0.999, 1.001]
    a = tuple(drift)
    b = tuple(x * y * 1.05 for x, y in zip(drift, wobble, strict=True))
    (row,) = compare.within(_together(a, b)).rows
    assert row.finding == "slower"
    assert row.ratio.low < 1 / 1.05 < row.ratio.high
    assert row.ratio.high - row.ratio.low < 0.02


def test_separate_reports_with_that_drift_show_nothing() -> None:
    drift = (1.0, 1.5, 1.1, 2.0, 1.3, 1.7)
    later = tuple(x * 1.05 for x in drift)
    (row,) = compare.between(_only(drift), _only(later), NAMES).rows
    assert row.finding == "no difference shown"


def test_separate_reports_show_a_large_difference() -> None:
    found = compare.between(_only(_noisy(1.0, 0.01, 8)), _only(_noisy(0.8, 0.01, 8, 1)), NAMES)
    (row,) = found.rows
    assert row.finding == "faster" and row.ratio.value == pytest.approx(1.25, rel=0.03)


def test_no_difference_is_found_where_there_is_none() -> None:
    """95% of the time: of 200 comparisons of one thing with itself, few cry wolf."""
    wolves = 0
    for seed in range(200):
        a, b = _noisy(1.0, 0.05, 6, seed), _noisy(1.0, 0.05, 6, seed + 1000)
        wolves += compare.within(_together(a, b)).rows[0].finding != "no difference shown"
    assert wolves <= 20


def test_one_repetition_shows_nothing() -> None:
    (row,) = compare.within(_together((1.0,), (9.0,))).rows
    assert row.finding == "no difference shown"
    assert row.ratio.to_dict()["high"] is None


_MACHINE = reports.made().machine
_REFUSED: dict[str, tuple[BenchReport, str]] = {
    "another processor": (
        replace(_only((0.5, 0.5)), machine=replace(_MACHINE, cpu="Cortex-A72")),
        "cpu: Cortex-A76 and Cortex-A72",
    ),
    "other cores": (
        replace(_only((0.5, 0.5)), machine=replace(_MACHINE, usable_cores=2)),
        "usable cores: 4 and 2",
    ),
    "another governor": (
        replace(_only((0.5, 0.5)), before=replace(reports.made().before, governor="powersave")),
        "governor",
    ),
    "a throttled run": (_only((0.5, 0.5), throttled=True), "throttled during after"),
    "a busy run": (_only((0.5, 0.5), others_share=0.5), "busy during after"),
    "other threads": (_only((0.5, 0.5), n_threads=1), "no setting was measured on both sides"),
    "another cache type": (_only((0.5, 0.5), kv_type="q8_0"), "no setting"),
}


@pytest.mark.parametrize(("other", "words"), _REFUSED.values(), ids=_REFUSED.keys())
def test_what_is_not_comparable_is_refused_with_its_reason(other: BenchReport, words: str) -> None:
    with pytest.raises(UsageError, match="not comparable") as caught:
        compare.between(_only((0.5, 0.5)), other, NAMES)
    assert words in caught.value.message


def test_a_throttled_run_is_refused_even_if_both_were_measured_together() -> None:
    found = _together((1.0, 1.1), (1.0, 1.1))
    rows = (found.rows[0], replace(found.rows[1], throttled=True))
    with pytest.raises(UsageError, match="throttled"):
        compare.within(replace(found, rows=rows))


def test_another_engine_is_comparable_and_said() -> None:
    other = reports.made()
    other = replace(other, engine=replace(other.engine, version="9.9"))
    found = compare.between(reports.made(), other, NAMES)
    assert any("9.9" in note for note in found.notes)
    labels = [row.label for row in found.rows]
    assert len(labels) == 4 and any("first token" in label for label in labels)


def test_the_gate_stops_what_is_slower_beyond_the_limit() -> None:
    found = compare.within(_together(_noisy(1.0, 0.005, 8), _noisy(1.1, 0.005, 8, 1)))
    with pytest.raises(GateError, match=r"9\.\d% slower .* allowed are 5\.0%") as caught:
        compare.gate(found, 0.05)
    assert caught.value.exit_code == 6
    assert compare.gate(found, 0.2) == []


def test_the_gate_lets_pass_what_is_faster_or_as_fast() -> None:
    for mean in (0.9, 1.0):
        found = compare.within(_together(_noisy(1.0, 0.005, 8), _noisy(mean, 0.005, 8, 1)))
        assert compare.gate(found, 0.05) == []


def test_the_gate_says_where_noise_hides_the_answer_and_fails_nothing() -> None:
    found = compare.within(_together(_noisy(1.0, 0.4, 5), _noisy(1.1, 0.4, 5, 1)))
    (sentence,) = compare.gate(found, 0.05)
    assert "too noisy to tell" in sentence


def test_more_rows_make_wider_intervals() -> None:
    """Else twenty rows would show a difference somewhere by chance alone."""
    a, b = _noisy(0.5, 0.02, 6), _noisy(0.5, 0.02, 6, 1)
    one = compare.between(_only(a), _only(b), NAMES).rows[0]
    many = [
        replace(
            reports.made(),
            rows=tuple(reports.row(samples_s=samples, n_prompt=n) for n in (512, 1, 2, 3, 4, 5)),
        )
        for samples in (a, b)
    ]
    first = compare.between(*many, NAMES).rows[0]
    assert first.ratio.value == one.ratio.value
    assert first.ratio.high > one.ratio.high
