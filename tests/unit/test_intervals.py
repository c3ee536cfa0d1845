"""Intervals are those of the tables, and hold the true value as often as they promise."""

from __future__ import annotations

import json
import math
import random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import intervals
from edgekit.errors import UsageError


# NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, to its three decimals.
@pytest.mark.parametrize(
    ("p", "degrees", "expected"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 5, 2.571),
        (0.975, 10, 2.228),
        (0.975, 30, 2.042),
        (0.975, 100, 1.984),
        (0.9, 3, 1.638),
        (0.95, 7, 1.895),
        (0.99, 19, 2.539),
        (0.999, 4, 7.173),
    ],
)
def test_quantiles_of_student_s_t_are_those_of_the_table(
    p: float, degrees: int, expected: float
) -> None:
    assert intervals.t_quantile(p, degrees) == pytest.approx(expected, abs=6e-4)


@given(st.floats(0.001, 0.999))
def test_quantiles_with_one_and_two_degrees_have_their_closed_forms(p: float) -> None:
    cauchy = math.tan(math.pi * (p - 0.5))
    assert intervals.t_quantile(p, 1) == pytest.approx(cauchy, rel=1e-9, abs=1e-9)
    two = (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    assert intervals.t_quantile(p, 2) == pytest.approx(two, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("p", [0.6, 0.9, 0.975, 0.9995])
def test_many_degrees_are_the_normal_distribution(p: float) -> None:
    z = NormalDist().inv_cdf(p)
    assert intervals.t_quantile(p, 1_000_000) == pytest.approx(z, rel=1e-5)


# R. G. Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E
@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_s_bounds_are_the_published_ones(
    hits: int, total: int, low: float, high: float
) -> None:
    found = intervals.proportion(hits, total)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert found.value == hits / total
    mirrored = intervals.proportion(total - hits, total)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_proportion_lies_within_its_own_bounds(trial: tuple[int, int]) -> None:
    found = intervals.proportion(*trial)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_a_mean_s_interval_holds_the_truth_as_often_as_it_promises() -> None:
    draw = random.Random(3)
    hits = 0
    for _ in range(2000):
        found = intervals.mean([draw.gauss(7, 2) for _ in range(5)], confidence=0.9)
        hits += found.low <= 7 <= found.high
    assert hits / 2000 == pytest.approx(0.9, abs=0.02)  # three standard errors


def test_a_proportion_s_interval_holds_the_truth_about_as_often_as_it_promises() -> None:
    draw = random.Random(4)
    hits = 0
    for _ in range(2000):
        found = intervals.proportion(sum(draw.random() < 0.9 for _ in range(60)), 60)
        hits += found.low <= 0.9 <= found.high
    assert hits / 2000 == pytest.approx(0.95, abs=0.02)


def test_pairs_see_a_difference_that_drowns_in_what_both_sides_share() -> None:
    draw = random.Random(5)
    shared = [draw.gauss(100, 20) for _ in range(12)]
    faster = [value - 1 + draw.gauss(0, 0.5) for value in shared]
    found = intervals.paired(faster, shared)
    assert found.high < 0
    assert found.low < -1 < found.high
    apart = intervals.mean(faster)
    assert apart.low < 100 < apart.high


def test_one_value_has_no_bounds_and_json_says_so() -> None:
    found = intervals.mean([4.0])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == {
        "value": 4.0,
        "low": None,
        "high": None,
    }


def test_equal_values_leave_no_doubt() -> None:
    assert vars(intervals.mean([0.25] * 9)) == {"value": 0.25, "low": 0.25, "high": 0.25}


@pytest.mark.parametrize(
    "call",
    [
        lambda: intervals.mean([]),
        lambda: intervals.paired([1.0], [1.0, 2.0]),
        lambda: intervals.proportion(0, 0),
        lambda: intervals.proportion(3, 2),
        lambda: intervals.t_quantile(1.0, 3),
        lambda: intervals.t_quantile(0.9, 0),
    ],
)
def test_what_has_no_answer_is_a_usage_error(call: object) -> None:
    assert callable(call)
    with pytest.raises(UsageError):
        call()
