"""The predictor meets the published speeds, those of boards that it was not fitted to as well."""

from __future__ import annotations

import pytest

from edgekit import plan_validate
from edgekit.predictor import CALIBRATION


@pytest.fixture(scope="module")
def found() -> plan_validate.Validation:
    return plan_validate.validate()


@pytest.mark.parametrize("blind", [False, True], ids=["all boards", "the board left out"])
def test_the_median_error_is_below_15_percent_and_none_above_40(
    found: plan_validate.Validation, blind: bool
) -> None:
    errors = found.summary(blind=blind)
    assert errors["median"] <= 0.15
    assert errors["max"] <= 0.40


def test_each_kind_of_board_has_published_rows(found: plan_validate.Validation) -> None:
    boards = {row.device for row in found.rows}
    assert {"rpi5", "rpi4", "rpi-zero2w", "rpi3b-plus", "n150", "macbook-m"} <= boards
    assert all(row.source for row in found.rows)


def test_the_constants_are_what_fitting_gives() -> None:
    fitted = plan_validate.fit()
    for name in ("memory", "prefill", "gpu_memory", "gpu_prefill", "vision", "traffic"):
        assert getattr(CALIBRATION, name) == pytest.approx(getattr(fitted, name), rel=0.03), name


def test_a_claim_beyond_the_memory_is_called_impossible(found: plan_validate.Validation) -> None:
    (claim,) = found.impossible
    assert "38 tok/s" in claim and "Raspberry Pi 5" in claim and "17.1" in claim
