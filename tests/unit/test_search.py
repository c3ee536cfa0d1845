"""The search: who beats whom, who goes on, and a study that survives what kills it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_data import network

from edgekit.training import distillation, residual, search
from edgekit.training.search import Search, Standing, Tried


def test_fronts_are_those_of_pareto() -> None:
    points = [(0.9, 1.0, 1.0), (0.8, 2.0, 1.0), (0.95, 3.0, 1.0), (0.8, 3.0, 2.0), (0.9, 1.0, 1.0)]
    assert search.ranks([Standing(*point) for point in points]) == [0, 1, 0, 2, 0]


def test_memory_alone_keeps_a_network_unbeaten() -> None:
    assert search.ranks([Standing(0.9, 1.0, 5.0), Standing(0.8, 2.0, 4.0)]) == [0, 0]


def test_the_first_goes_on_and_then_the_better_part() -> None:
    rivals = [Standing(0.1 * n, 1.0, 1.0) for n in range(1, 6)]
    assert search.goes_on(rivals[0], [], 0.5)
    assert search.goes_on(Standing(0.45, 1.0, 1.0), rivals, 0.5)
    assert not search.goes_on(Standing(0.05, 1.0, 1.0), rivals, 0.5)
    assert search.goes_on(Standing(0.05, 0.1, 1.0), rivals, 0.5)  # by far the fastest
    assert search.goes_on(Standing(0.05, 1.0, 1.0), rivals, 1.0)


def tried(number: int, accuracy: float, ms: float, end: str = "complete") -> Tried:
    return Tried(number, {"width": number}, Standing(accuracy, ms, 1.0), (accuracy,), end)


def test_the_winner_is_the_fastest_of_the_best() -> None:
    trials = [tried(0, 0.90, 1.0), tried(1, 0.899, 0.5), tried(2, 0.88, 0.1), tried(3, 0.8, 2.0)]
    trials.append(tried(4, 0.95, 0.1, end="pruned"))
    assert [each.number for each in search.front(trials)] == [2, 1, 0]
    assert search.winner(trials, 0.0).number == 0
    assert search.winner(trials, 0.005).number == 1
    assert search.winner(trials, 0.05).number == 2


def opened(folder: Path) -> Search:
    return Search(folder / "study.db", seed=0, describe=lambda made: (made / 10, 4.0 * made))


def suggest(trial: Any) -> int:
    return int(trial.suggest_int("width", 1, 50))


def test_a_study_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    first = opened(tmp_path)
    for end in ("complete", "pruned", "fail"):
        number, made, standing = first.ask(suggest)
        assert (standing.ms, standing.memory_bytes) == (made / 10, 4.0 * made)
        first.tell(number, [0.5, 0.7] if end == "complete" else [0.5], end)
    _, width, _ = first.ask(suggest)  # never told: the process dies here
    again = opened(tmp_path)
    ended = again.trials()
    assert [each.end for each in ended] == ["complete", "pruned", "fail", "fail"]
    assert ended[0].standing.accuracy == 0.7 and ended[0].rungs == (0.5, 0.7)
    assert [each.accuracy for each in again.rivals(1)] == [0.7]
    assert again.ask(suggest)[1] == width and again.spent_s >= 0
    third = opened(tmp_path)  # the same one again: it may be what kills
    widths = [each.params["width"] for each in third.trials()]
    assert widths.count(width) >= 2 and len(third.trials()) == 5
    third.ask(suggest)
    with sqlite3.connect(tmp_path / "study.db") as file:
        waiting = file.execute("select count(*) from trials where state = 'WAITING'").fetchone()
    assert waiting == (0,)


def test_a_study_that_is_half_made_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(search._fs, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path)
    assert not (tmp_path / "study.db").exists()
    monkeypatch.undo()
    for more in range(3):
        found = opened(tmp_path)
        assert len(found.trials()) == more
        number, *_ = found.ask(suggest)
        found.tell(number, [0.5], "complete")


def test_the_time_of_a_search_that_has_ended_is_kept(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.begin()
    assert first._begun_s is not None
    first._begun_s -= 100  # after the last trial was told
    first.end()
    assert 100 <= opened(tmp_path).spent_s < 110


def test_time_that_was_spent_is_spent(tmp_path: Path) -> None:
    first = opened(tmp_path)
    assert first.spent_s == 0.0
    first.begin()
    assert first._begun_s is not None
    first._begun_s -= 100
    number, *_ = first.ask(suggest)
    first.tell(number, [0.5], "complete")
    assert 100 <= opened(tmp_path).spent_s < 110


@pytest.mark.slow
def test_the_search_looks_where_it_is_good(tmp_path: Path) -> None:
    """Accuracy grows with width up to 20 and latency always: the front ends at 20."""
    found = opened(tmp_path)
    for _ in range(60):
        number, width, _ = found.ask(suggest)
        found.tell(number, [min(width, 20) / 20], "complete")
    late = [each.params["width"] for each in found.trials()[20:]]
    assert sum(width <= 21 for width in late) > 0.6 * len(late)
    assert search.winner(found.trials(), 0.0).params["width"] in (20, 21)


def test_trials_become_a_table_and_a_picture(tmp_path: Path) -> None:
    trials = [tried(0, 0.9, 1.0), tried(1, 0.8, 0.5), tried(2, 0.3, 0.7, end="pruned")]
    search.write(tmp_path / "trials.csv", trials)
    lines = (tmp_path / "trials.csv").read_text().splitlines()
    assert len(lines) == 4 and '""width"": 2' in lines[3] and lines[3].startswith("2,pruned,0.3")
    search.draw(tmp_path / "front.png", trials, trials[0], where="here")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


# Distillation's formulas


def test_answers_of_a_teacher_are_matched_at_any_temperature() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(6, 5), torch.randn(6, 5, requires_grad=True)
    for temperature in (1.0, 4.0):
        loss = distillation.of_answers(student, teacher, temperature)
        p, q = (F.softmax(each / temperature, 1) for each in (teacher, student))
        expected = temperature**2 * (p * (p.log() - q.log())).sum()
        torch.testing.assert_close(loss, expected)
        assert float(distillation.of_answers(teacher, teacher, temperature)) == 0.0
    # Gradients of a soft target do not vanish with the temperature.
    sizes = []
    for temperature in (4.0, 16.0):
        (gradient,) = torch.autograd.grad(
            distillation.of_answers(student, teacher, temperature), student
        )
        sizes.append(float(gradient.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.3)


def test_features_that_are_the_teachers_cost_nothing() -> None:
    torch.manual_seed(0)
    teacher = [torch.randn(2, 4, 6, 6), torch.randn(2, 8, 3, 3) * 100]
    assert float(distillation.of_features(teacher, teacher)) == 0.0
    silent = [torch.zeros_like(each) for each in teacher]
    # Half of the mean square, relative to it, for each of the two images, whatever its size.
    assert float(distillation.of_features(silent, teacher)) == pytest.approx(1.0, rel=1e-5)


def test_attention_is_where_channels_are_large_however_many_they_are() -> None:
    teacher = torch.zeros(1, 3, 2, 2)
    teacher[0, :, 0, 0] = torch.tensor([1.0, -2.0, 2.0])  # all at one place
    same, elsewhere = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    same[0, 1, 0, 0], elsewhere[0, 0, 1, 1] = -0.1, 7.0
    assert float(distillation.of_attention([same], [teacher])) == pytest.approx(0, abs=1e-6)
    # Vectors of length 1 at right angles: half of the squared distance is 1, for each image.
    assert float(distillation.of_attention([elsewhere], [teacher])) == pytest.approx(1)
    both = [torch.cat([same, elsewhere]), elsewhere], [teacher.repeat(2, 1, 1, 1), teacher]
    assert float(distillation.of_attention(*both)) == pytest.approx(1)


def test_a_pupil_answers_as_its_student_does() -> None:
    torch.manual_seed(0)
    config = residual.config((1, 8, 8), 3, kind="basic", widths=(4, 6), blocks=(1, 1))
    student = residual.build(config)
    pupil = distillation.Pupil(student, [(4, 8), (6, 12)])
    images = torch.randn(2, 1, 8, 8)
    logits, made, own = pupil.train()(images)
    assert logits.shape == (2, 3) and [each.shape[1] for each in made] == [8, 12]
    assert [each.shape[1] for each in own] == [4, 6]
    assert torch.equal(pupil.eval()(images), student.eval()(images))
    state = distillation.of_student(pupil.state_dict())
    again = residual.build(config)
    again.load_state_dict(state)
    assert torch.equal(again.eval()(images), student(images))
    # Where features are not taught nothing is made of them, and no weights wait for a gradient.
    bare = distillation.Pupil(student)
    assert len(list(bare.parameters())) == len(list(student.parameters()))
    assert bare.train()(images)[1] == []


def test_the_scale_of_a_teacher_is_the_one_of_the_least_loss() -> None:
    torch.manual_seed(0)
    true = torch.randn(4000, 5) * 2
    classes = torch.multinomial(true.softmax(1), 1)[:, 0]
    # Answers are three times too sure, or half as sure as they are right.
    for wrong in (3.0, 0.5):
        scale = distillation.calibrating_scale(wrong * true, classes)
        assert scale == pytest.approx(1 / wrong, rel=0.05)
        least = float(F.cross_entropy(scale * wrong * true, classes))
        for other in (0.97 * scale, 1.03 * scale):
            assert float(F.cross_entropy(other * wrong * true, classes)) > least
    # A teacher that is never wrong could be ever surer: there is an end to it.
    assert distillation.calibrating_scale(true, true.argmax(1)) == pytest.approx(4.0)


def test_weights_of_another_network_are_no_student() -> None:
    assert distillation.of_student(network().state_dict()) == {}
