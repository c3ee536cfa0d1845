"""The trainer: the same numbers however a run is cut, stopped or spread; and what it refuses."""

from __future__ import annotations

import csv
import errno
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from training_data import Points, network, square

from edgekit import _fs
from edgekit.errors import (
    CorruptArtifactError,
    DataError,
    DivergedError,
    DoesNotFitError,
    OutOfSpaceError,
)
from edgekit.training import checkpoint, memory, optimizer, schedule, trainer
from edgekit.training.settings import Settings
from edgekit.training.trainer import Batch, Fitted, Status, Task

SETTINGS = Settings(
    steps=24,
    batch=16,
    lr=1e-2,
    ema=0.9,
    eval_every=6,
    checkpoint_every=4,
    log_every=1,
    device="cpu",
)


CURVE = "curve-points.csv"


class Killed(Exception):
    """Stands for the process's end: nothing after the step runs."""


def fit(
    place: Path,
    settings: Settings = SETTINGS,
    *,
    stop_at: int = 0,
    say: Callable[[Status], None] = lambda status: None,
    **changed: Any,
) -> Fitted:
    def told(status: Status) -> None:
        say(status)
        if stop_at and status.step == stop_at:
            raise Killed

    task = Task("points", network(), Points(), square, loss_on_points)
    return trainer.fit(replace(task, **changed), settings, place, Accelerator(cpu=True), told)


def loss_on_points(model: torch.nn.Module) -> dict[str, float]:
    points = Points()
    return {"loss": (model(points.x) - points.y).square().mean().item()}


def same(one: Fitted, other: Fitted) -> bool:
    """Every number but the seconds, bit for bit."""
    return (
        [point[:4] for point in one.curve] == [point[:4] for point in other.curve]
        and one.evaluations == other.evaluations
        and all(torch.equal(one.state[name], other.state[name]) for name in one.state)
    )


def test_it_learns(tmp_path: Path) -> None:
    found = fit(tmp_path, replace(SETTINGS, steps=300, eval_every=0))
    assert found.curve[0][1] > 0.4 and found.figures["loss"] < 0.1


def test_equal_seeds_give_equal_runs_and_others_do_not(tmp_path: Path) -> None:
    one, again = fit(tmp_path / "a"), fit(tmp_path / "b")
    other = fit(tmp_path / "c", replace(SETTINGS, seed=1))
    assert same(one, again) and not same(one, other)


@pytest.mark.parametrize("stop_at", [1, 4, 5, 13, 23])
def test_a_run_that_was_stopped_ends_with_the_same_numbers(tmp_path: Path, stop_at: int) -> None:
    whole = fit(tmp_path / "whole")
    with pytest.raises(Killed):
        fit(tmp_path / "cut", stop_at=stop_at)
    assert same(fit(tmp_path / "cut"), whole)


def test_kernels_that_lie_channels_last_go_on_with_their_own_moments(tmp_path: Path) -> None:
    def convolved() -> torch.nn.Module:
        torch.manual_seed(0)
        layers = [torch.nn.Unflatten(1, (2, 3, 1)), torch.nn.Conv2d(2, 4, 3, padding=1)]
        more = [torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(12, 1)]
        return torch.nn.Sequential(*layers, *more).to(memory_format=torch.channels_last)

    whole = fit(tmp_path / "whole", model=convolved())
    with pytest.raises(Killed):
        fit(tmp_path / "cut", stop_at=13, model=convolved())
    assert same(fit(tmp_path / "cut", model=convolved()), whole)


def half_frozen() -> torch.nn.Module:
    model = network()
    for weight in next(model.children()).parameters():
        weight.requires_grad_(False)
    return model


def test_frozen_weights_stay_out_of_the_checkpoint_and_in_the_result(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", model=half_frozen())
    tensors, _ = checkpoint.read(tmp_path / "whole" / "checkpoint.safetensors")
    held = {name for name in tensors if name.startswith(("model", "average", "optimizer"))}
    assert held and not any(".layers." in name for name in held)
    assert torch.equal(whole.state["layers.0.weight"], network().state_dict()["layers.0.weight"])
    with pytest.raises(Killed):
        fit(tmp_path / "cut", stop_at=13, model=half_frozen())
    assert same(fit(tmp_path / "cut", model=half_frozen()), whole)
    with pytest.raises(CorruptArtifactError):  # it has not all that another model trains
        fit(tmp_path / "cut", model=network())


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    assert same(fit(tmp_path, stop_at=24), whole)


def test_pieces_of_a_batch_add_up_to_the_batch(tmp_path: Path) -> None:
    settings = replace(SETTINGS, ema=0.0)
    points = torch.nn.Linear(6, 1)  # without dropout, which differs from piece to piece
    start = {name: each.clone() for name, each in points.state_dict().items()}
    curves = []
    for accumulate in (1, 3):
        points.load_state_dict(start)
        changed = replace(settings, accumulate=accumulate)
        curves.append(fit(tmp_path / str(accumulate), changed, model=points).curve)
    losses = [torch.tensor([point[1] for point in curve]) for curve in curves]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_patience_ends_a_run_and_keeps_the_best_weights(tmp_path: Path) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 0.0])
    seen = []

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        seen.append({name: each.clone() for name, each in model.state_dict().items()})
        return {"loss": next(losses)}

    found = fit(tmp_path, replace(SETTINGS, eval_every=2, patience=2, ema=0.0), evaluate=evaluate)
    assert found.steps == 8 and found.figures == {"loss": 1.0}
    assert all(torch.equal(found.state[name], each) for name, each in seen[1].items())


def test_averaged_weights_are_what_is_evaluated_and_returned(tmp_path: Path) -> None:
    found = fit(tmp_path)
    model = network()
    model.load_state_dict(found.state)
    assert loss_on_points(model.eval())["loss"] == pytest.approx(found.figures["loss"])
    tensors, _ = checkpoint.read(tmp_path / "checkpoint.safetensors")
    last, average = (tensors[f"{kind}.last.weight"] for kind in ("model", "average"))
    assert torch.equal(average, found.state["last.weight"]) and not torch.equal(last, average)


def test_bf16_trains_with_weights_in_full(tmp_path: Path) -> None:
    found = fit(tmp_path, replace(SETTINGS, precision="bf16"))
    assert found.curve != fit(tmp_path / "fp32").curve
    assert found.state["last.weight"].dtype == torch.float32
    assert found.curve[-1][1] < found.curve[0][1]


def points_of(place: Path) -> list[tuple[int, float]]:
    with (place / CURVE).open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_the_curve_lies_beside_each_checkpoint_while_the_run_goes_on(tmp_path: Path) -> None:
    def look(status: Status) -> None:
        if status.step > 4:  # the last checkpoint but for the step that is told
            saved = (status.step - 1) // 4 * 4
            assert [step for step, _ in points_of(tmp_path)] == list(range(1, saved + 1))

    with pytest.raises(Killed):
        fit(tmp_path, stop_at=14, say=look)
    assert len(points_of(tmp_path)) == 12
    whole = fit(tmp_path, say=look)
    assert points_of(tmp_path) == [(int(point[0]), point[1]) for point in whole.curve]


def test_a_run_that_diverged_has_its_curve_up_to_there(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="step 7"):
        fit(tmp_path, loss=nan_after(6))
    assert [step for step, _ in points_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert points_of(tmp_path) == [
        (int(point[0]), point[1]) for point in fit(tmp_path / "whole").curve[:6]
    ]


def test_a_checkpoint_is_plain_safetensors(tmp_path: Path) -> None:
    fit(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.safetensors", CURVE}
    tensors, body = checkpoint.read(tmp_path / "checkpoint.safetensors")
    assert {name.partition(".")[0] for name in tensors} == {
        *("model", "optimizer", "average", "curve")
    }
    assert body["step"] == 24 and body["done"]


# What is refused, and what is kept


def nan_after(step: int) -> Callable[..., torch.Tensor]:
    seen = []

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(len(batch[0]))
        bad = seen.count(SETTINGS.batch) > step
        return square(model, batch) * (float("nan") if bad else 1.0)

    return loss


def test_a_loss_that_is_no_number_ends_the_run_and_the_good_checkpoint_stays(
    tmp_path: Path,
) -> None:
    with pytest.raises(DivergedError, match="step 7"):
        fit(tmp_path, loss=nan_after(6))
    _, body = checkpoint.read(tmp_path / "checkpoint.safetensors")
    assert body["step"] == 4
    assert same(fit(tmp_path), fit(tmp_path / "whole"))


def test_a_loss_that_is_no_number_at_the_last_step_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="loss is nan at step 24"):
        fit(tmp_path, loss=nan_after(23))
    _, body = checkpoint.read(tmp_path / "checkpoint.safetensors")
    assert body["step"] == 20 and not body["done"]
    assert same(fit(tmp_path), fit(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("wrong", "figure"), [(float("nan"), "loss"), (float("inf"), "loss"), (float("nan"), "other")]
)
def test_an_evaluation_that_is_no_number_ends_the_run_and_is_never_the_best(
    tmp_path: Path, wrong: float, figure: str
) -> None:
    seen: list[float] = []

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        seen.append(1.0)
        found = {**loss_on_points(model), "other": 1.0}
        return found | ({figure: wrong} if len(seen) == 2 else {})

    settings = replace(SETTINGS, patience=9)
    with pytest.raises(DivergedError, match=f"held-out {figure} is {wrong} at step 12") as caught:
        fit(tmp_path, settings, evaluate=evaluate)
    assert "last good checkpoint is kept" in str(caught.value.hint)
    _, body = checkpoint.read(tmp_path / "checkpoint.safetensors")
    assert body["step"] == 8 and [each["step"] for each in body["evaluations"]] == [6]
    best, _ = checkpoint.read(tmp_path / "best.safetensors")
    model = network()
    model.load_state_dict(best)
    assert loss_on_points(model.eval())["loss"] == pytest.approx(body["best"])
    seen.append(1.0)  # from here on all evaluations are numbers
    whole = fit(tmp_path / "whole", settings, evaluate=evaluate)
    assert same(fit(tmp_path, settings, evaluate=evaluate), whole)


class Broken(torch.optim.SGD):
    """Its last step makes weights that are no numbers, though the gradients were."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == SETTINGS.steps:
            self.param_groups[0]["lr"] = float("inf")
        return super().step(closure)


def test_weights_that_the_last_step_made_no_numbers_are_never_a_result(tmp_path: Path) -> None:
    def optimizers(model: torch.nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
        return [Broken(model.parameters(), lr=settings.lr)]

    with pytest.raises(DivergedError, match="not finite at step 24"):
        fit(tmp_path, replace(SETTINGS, eval_every=0), evaluate=None, optimizers=optimizers)
    _, body = checkpoint.read(tmp_path / "checkpoint.safetensors")
    assert body["step"] == 20 and not body["done"]


def test_a_full_disk_ends_the_run_and_the_good_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, stop_at=5)
    monkeypatch.setattr(_fs, "free_bytes", lambda path: 1000)
    with pytest.raises(OutOfSpaceError) as caught:
        fit(tmp_path)
    assert "--resume" in str(caught.value.hint)
    monkeypatch.undo()
    assert same(fit(tmp_path), fit(tmp_path / "whole"))


def test_a_disk_that_fills_up_in_the_middle_of_a_checkpoint_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise checkpoint.SafetensorError(
            f"Error while serializing: I/O error: No space left (os error {errno.ENOSPC})"
        )

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OutOfSpaceError):
        fit(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, stop_at=5)
    path = tmp_path / "checkpoint.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CorruptArtifactError):
        fit(tmp_path)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fit(tmp_path, stop_at=5)
    with pytest.raises(CorruptArtifactError, match="no checkpoint of this run"):
        fit(tmp_path, model=torch.nn.Linear(6, 1))


def test_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not one sample"):
        fit(tmp_path, data=Points(0))


def test_data_fewer_than_a_batch_are_gone_through_several_times(tmp_path: Path) -> None:
    assert fit(tmp_path, data=Points(5)).steps == 24


def test_what_does_not_fit_the_memory_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 6 * 32 + 32 + 32 * 32 + 32 + 32 + 1
    monkeypatch.setattr(memory, "_SPARE_BYTES", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 15 * weights + 10_000)
    stepped = []
    with pytest.raises(DoesNotFitError) as caught:
        fit(tmp_path, evaluate=lambda model: stepped.append(1))
    assert not stepped and not list(tmp_path.iterdir())
    assert "activations" in caught.value.message and "16 samples" in caught.value.message
    hint = str(caught.value.hint)
    assert hint.startswith("--set accumulate=") and hint.endswith(" samples")
    pieces, fit_in = map(int, re.findall(r"\d+", hint))
    done = fit(tmp_path, replace(SETTINGS, accumulate=pieces))  # what the hint says is enough
    assert done.steps == SETTINGS.steps and pieces * fit_in >= SETTINGS.batch


def test_memory_that_runs_out_in_a_step_is_told_as_such_and_the_good_checkpoint_stays(
    tmp_path: Path,
) -> None:
    seen = []

    def greedy(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        seen.append(len(batch[0]))
        if seen.count(SETTINGS.batch) > 6:
            torch.empty(1 << 60, dtype=torch.uint8)
        return square(model, batch)

    with pytest.raises(DoesNotFitError, match=r"out of memory: .*1152921504606846976") as caught:
        fit(tmp_path, loss=greedy)
    assert "accumulate=2" in str(caught.value.hint)
    assert checkpoint.read(tmp_path / "checkpoint.safetensors")[1]["step"] == 4
    assert same(fit(tmp_path), fit(tmp_path / "whole"))


def test_another_mistake_is_not_taken_for_want_of_memory(tmp_path: Path) -> None:
    def wrong(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return square(model, (batch[0][:, :3], batch[1]))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(tmp_path, loss=wrong)


def test_what_a_step_needs_is_told_before_the_first_one(tmp_path: Path) -> None:
    told: list[Status] = []
    with pytest.raises(Killed):
        fit(tmp_path, stop_at=5, say=told.append)
    assert [status.step for status in told] == [0, 1, 2, 3, 4, 5]
    assert "activations" in told[0].memory and not any(status.memory for status in told[1:])
    told.clear()
    fit(tmp_path, say=told.append)  # it goes on: nothing is new
    assert not any(status.memory for status in told)


def test_muon_learns_and_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    muon = {"optimizers": optimizer.muon}
    whole = fit(tmp_path / "whole", **muon)
    assert whole.figures["loss"] < whole.evaluations[0]["loss"]
    assert not same(whole, fit(tmp_path / "adamw"))
    with pytest.raises(Killed):
        fit(tmp_path / "cut", stop_at=13, **muon)
    assert same(fit(tmp_path / "cut", **muon), whole)


def test_muon_moves_matrices_of_the_blocks_alone_and_as_far_in_all_directions() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 16), torch.nn.Linear(16, 8))
    before = model[1].weight.detach().clone()
    settings = replace(SETTINGS, weight_decay=0.0)
    matrices, rest = optimizer.muon(model, settings)
    assert [each.shape for each in matrices.param_groups[0]["params"]] == [(8, 16)]
    assert sum(len(group["params"]) for group in rest.param_groups) == 2
    model(torch.arange(9)).square().sum().backward()
    matrices.step()
    moved = torch.linalg.svdvals(before - model[1].weight.detach()) / (1e-2 * 0.2 * 16**0.5)
    assert float(moved.min()) > 0.5 and float(moved.max()) < 1.5


def test_the_sum_of_the_memory_counts_what_autograd_keeps() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 8))

    def forward(count: int) -> torch.Tensor:
        return model(torch.zeros(count, 64)).sum()

    found = memory.measure(model, forward, samples=100, averages=True, device=torch.device("cpu"))
    weights = 4 * (64 * 256 + 256 + 256 * 8 + 8)
    assert (found.gradients, found.optimizer, found.average) == (weights, 2 * weights, weights)
    # The input of the first layer, and the output of tanh, which is the input of the last too: with
    # its gradient and a copy of that.
    assert found.per_sample == 4 * (64 + 3 * 256)
    asked_for = 4 * weights + found.activations
    assert found.needed == found.spare_bytes + asked_for + asked_for // 4
    assert f"spare room {found.spare / 1e6:,.1f} MB" in str(found)


@pytest.mark.parametrize("large", [1, 4])
def test_what_a_step_takes_is_measured_and_is_about_what_was_told(
    tmp_path: Path, large: int
) -> None:
    """Of a network whose activations count: 64 or 256 MB of them, and 16 MB of weights."""
    points = Points()
    points.x = torch.randn(len(points), 1024)

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return model(batch[0].repeat(128 * large, 1)).square().sum()

    def wide() -> torch.nn.Module:
        layers = [torch.nn.Linear(1024, 1024) for _ in range(4)]
        return torch.nn.Sequential(*(part for each in layers for part in (each, torch.nn.GELU())))

    settings = replace(SETTINGS, steps=6, ema=0.0, threads=1)
    given: Any = {"data": points, "loss": loss, "evaluate": None}
    found = fit(tmp_path, settings, model=wide(), **given)
    assert found.taken_bytes is not None and found.needed_bytes > large * 64e6
    assert 0.6 < found.taken_bytes / found.needed_bytes < 1.25
    again = fit(tmp_path, settings, model=wide(), **given)  # what is finished is not measured again
    assert (again.needed_bytes, again.taken_bytes) == (found.needed_bytes, found.taken_bytes)


def test_where_the_system_does_not_tell_nothing_is_said_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.machine._OWN", tmp_path / "nowhere")
    assert fit(tmp_path / "run").taken_bytes is None


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_the_learning_rate_rises_and_keeps_its_course(kind: Any) -> None:
    settings = Settings(steps=100, warmup=0.1, schedule=kind, decay=0.2, min_lr=0.1)
    factors = [schedule.factor(settings, step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == pytest.approx(1.0) and min(factors[10:]) >= 0.1
    ends = {"cosine": 0.1, "wsd": 0.145, "constant": 1.0}
    assert factors[99] == pytest.approx(ends[kind], abs=1e-3)
    assert (factors[79] == 1.0) == (kind != "cosine")
