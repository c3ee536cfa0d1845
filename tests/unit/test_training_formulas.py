"""The formulas of the papers, each held against another way to compute it, or its closed form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from edgekit.training import (
    channel_groups,
    diffusion,
    distill_lm,
    image_judge,
    language,
    residual,
    schedule,
    tinyllama,
    vit_qat,
)
from edgekit.training.average import Average
from edgekit.training.images import Images, Labelled
from edgekit.training.kneser_ney import KneserNey
from edgekit.training.learned_steps import Levels, OnGrid, RowSteps
from edgekit.training.llama import Llama
from edgekit.training.settings import Settings

# The course of a training


@pytest.mark.parametrize("done", [0.0, 0.25, 0.5, 0.9])
def test_a_cosine_and_a_straight_line_lead_down(done: float) -> None:
    step = 100 + round(400 * done)
    cosine = Settings(steps=500, warmup=0.2, schedule="cosine", min_lr=0.1)
    expected = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
    assert schedule.factor(cosine, step) == pytest.approx(expected)
    wsd = Settings(steps=500, warmup=0.2, schedule="wsd", decay=0.8, min_lr=0.1)
    assert schedule.factor(wsd, step) == pytest.approx(1 - 0.9 * done)


def test_an_average_gives_each_step_the_weight_of_its_age() -> None:
    """Of weights that come one after the other: (1 - d) d^age, with a lower d at first."""
    model = torch.nn.Linear(1, 1, bias=False)
    values = [float(number**2) for number in range(60)]
    with torch.no_grad():
        model.weight.fill_(-7.0)
        average = Average(model, 0.9)
        for step, value in enumerate(values):
            model.weight.fill_(value)
            average.update(step)
    decays = [min(0.9, (1 + step) / (10 + step)) for step in range(60)]
    weights = [(1 - decays[at]) * math.prod(decays[at + 1 :]) for at in range(60)]
    start = math.prod(decays)
    assert sum(weights) + start == pytest.approx(1)
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) - 7 * start
    with average.applied():
        assert model.weight.item() == pytest.approx(expected, rel=1e-5)


# Language models


def by_the_book(tokens: list[int], vocab: int, order: int) -> Any:
    """Chen and Goodman's interpolated modified Kneser-Ney in dictionaries, without arrays: a
    function of a history (the last ``order - 1`` tokens) and a token.
    """
    grams = [tuple(tokens[at : at + order]) for at in range(len(tokens) - order + 1)]
    counts: dict[int, Mapping[tuple[int, ...], int]] = {order: Counter(grams)}
    for length in range(order - 1, 0, -1):
        counts[length] = Counter(gram[1:] for gram in counts[length + 1])

    def discount(length: int, count: int) -> float:
        n = Counter(counts[length].values())
        y = n[1] / (n[1] + 2 * n[2])
        return {
            1: 1 - 2 * y * n[2] / n[1],
            2: 2 - 3 * y * n[3] / n[2],
            3: 3 - 4 * y * n[4] / n[3],
        }[min(count, 3)]

    def probability(history: tuple[int, ...], token: int) -> float:
        length = len(history) + 1
        lower = probability(history[1:], token) if history else 1 / vocab
        after = {gram[-1]: c for gram, c in counts[length].items() if gram[:-1] == history}
        if not after:
            return lower
        total = sum(after.values())
        own = after.get(token, 0)
        kept = own - discount(length, own) if own else 0.0
        freed = sum(discount(length, count) for count in after.values())
        return kept / total + freed / total * lower

    return probability


def test_kneser_ney_has_the_discounts_and_the_counts_of_the_paper() -> None:
    random = np.random.default_rng(5)
    tokens = random.zipf(1.5, 3000)
    tokens = tokens[tokens < 200]
    model = KneserNey(tokens, 256, order=3)
    expected = by_the_book(tokens.tolist(), 256, 3)
    read = random.permutation(tokens)[:60]
    logs = model.log_probabilities(read)
    for at in range(1, len(read)):
        history = tuple(read[max(0, at - 2) : at].tolist())
        assert logs[at - 1] == pytest.approx(math.log(expected(history, int(read[at]))))


def test_a_text_too_small_for_the_discounts_loses_half_a_count_at_most() -> None:
    """Two words in turn: no pair is there once, and no text says what a rare one loses."""
    model = KneserNey(np.array([0, 1] * 50), 4, order=2)
    # Each word is behind one other: 1 less 0.5 of 2, and what is freed for all four.
    single = [0.5 / 2 + 1.0 / 2 / 4, 1.0 / 2 / 4]
    expected = [(50 - 1.5) / 50 + 1.5 / 50 * single[0], 1.5 / 50 * single[1]]
    found = [model.log_probabilities(np.array([0, token]))[0] for token in (1, 3)]
    assert found == pytest.approx(np.log(expected))


def test_no_text_makes_a_token_impossible() -> None:
    """Of few grams the discounts of equation 26 can come to less than 0."""
    for seed in range(60):
        random = np.random.default_rng(seed)
        tokens = random.choice(6, 40 + 5 * seed, p=[0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
        logs = KneserNey(tokens, 8, order=3).log_probabilities(random.integers(0, 8, 200))
        assert np.isfinite(logs).all() and logs.max() < 0, seed


def test_the_operations_of_training_are_those_that_torch_counts() -> None:
    shape, length, pieces = tinyllama.SIZES["toy"], 128, 3
    ids = torch.arange(pieces * length).view(pieces, length) % shape.vocab
    with FlopCounterMode(display=False) as counter:
        language.loss(Llama(shape), (ids, ids)).backward()
    # Attention's scores that the mask throws away are computed here: as many as those that count.
    masked = 6 * shape.layers * shape.width * length
    counted = counter.get_total_flops() / (pieces * length)
    assert counted == pytest.approx(shape.train_flops(length) + masked, rel=1e-6)


def test_attention_s_distance_is_the_teacher_s_divergence_from_the_student() -> None:
    torch.manual_seed(0)
    mine, theirs = (torch.randn(2, 3, 4, 4).mul(2).softmax(-1) for _ in range(2))
    one_way = (theirs * (theirs / mine).log()).sum(-1).mean()
    other_way = (mine * (mine / theirs).log()).sum(-1).mean()
    assert abs(float(one_way - other_way)) > 0.05
    torch.testing.assert_close(distill_lm.attention_loss(mine, theirs), one_way)


# Diffusion


def test_shares_follow_the_cosine_of_the_paper() -> None:
    """Equation 17 of Nichol and Dhariwal with s = 0, up to the share that generating starts at."""
    time = torch.linspace(0, 1, 11)
    alpha, _ = diffusion.shares(time)
    at = 0.999 * time  # of T
    torch.testing.assert_close(alpha**2, torch.cos(at * torch.pi / 2) ** 2)


class Oracle(torch.nn.Module):
    """Knows both what the image is and what the noise is."""

    def __init__(self, image: torch.Tensor, noise: torch.Tensor) -> None:
        super().__init__()
        self.image, self.noise = image, noise

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (each.view(-1, 1, 1, 1) for each in diffusion.shares(time))
        return alpha * self.noise - sigma * self.image


def test_a_step_mixes_the_same_image_and_the_same_noise_anew() -> None:
    torch.manual_seed(0)
    image, noise = torch.rand(2, 1, 8, 8) * 2 - 1, torch.randn(2, 1, 8, 8)
    generator = diffusion.Generator(1, [8, 8], 1, 10)
    generator.denoiser = Oracle(image, noise)

    def mixed(time: float) -> torch.Tensor:
        alpha, sigma = diffusion.shares(torch.tensor(time))
        return alpha * image + sigma * noise

    for time, after in ((1.0, 0.9), (0.7, 0.3), (0.2, 0.1)):
        torch.testing.assert_close(generator.step(mixed(time), time, after), mixed(after))


def test_the_distance_knows_gaussians_that_lie_askew() -> None:
    """trace((C D)^(1/2)) is the sum of the roots of the eigenvalues of C D, which is not symmetric
    where C and D do not commute.
    """
    random = torch.Generator().manual_seed(1)
    one, other = (
        torch.randn(500, 4, generator=random, dtype=torch.float64)
        @ torch.randn(4, 4, generator=random, dtype=torch.float64)
        for _ in range(2)
    )
    c, d = one.T.cov(), other.T.cov()
    assert float((c @ d - d @ c).abs().max()) > 0.1
    roots = torch.linalg.eigvals(c @ d).sqrt().sum().real
    expected = (one.mean(0) - other.mean(0)).square().sum() + c.trace() + d.trace() - 2 * roots
    assert image_judge.frechet(one, other) == pytest.approx(float(expected), rel=1e-9)


# Few bits, and a teacher


@pytest.mark.parametrize("kind", ["signed", "unsigned", "offset"])
def test_an_activation_s_step_learns_at_lsq_s_pace(kind: Any) -> None:
    """1 / sqrt(features * highest level), and the step itself for its logarithm."""
    torch.manual_seed(0)
    x, weights = torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    levels = Levels(3, kind)
    levels.set(torch.tensor([0.4]), torch.tensor([0.1]))
    (levels(x) * weights).sum().backward()
    step = torch.tensor([0.4], requires_grad=True)
    offset = levels.start.requires_grad_()
    (OnGrid.apply(x, step, offset, levels.low, levels.high, 1.0) * weights).sum().backward()
    pace = 0.4 / math.sqrt(3 * 8 * levels.high)
    assert step.grad is not None and levels.log_step.grad is not None
    torch.testing.assert_close(levels.log_step.grad, step.grad * pace)
    if levels.offset is not None:
        torch.testing.assert_close(levels.offset.grad, offset.grad)


def test_a_weight_s_steps_learn_at_lsq_s_pace() -> None:
    torch.manual_seed(0)
    weight, upstream = torch.randn(4, 9), torch.randn(4, 9)
    steps = RowSteps(3, 4)
    own = torch.tensor([0.2, 0.3, 0.4, 0.5])
    steps.set(own)
    (steps(weight) * upstream).sum().backward()
    step = own.view(4, 1).clone().requires_grad_()
    (OnGrid.apply(weight, step, None, -4, 3, 1.0) * upstream).sum().backward()
    assert step.grad is not None and steps.log_step.grad is not None
    torch.testing.assert_close(steps.log_step.grad, step.grad[:, 0] * own / math.sqrt(9 * 3))


def test_a_taught_network_hears_labels_and_teacher_in_the_parts_that_were_asked_for() -> None:
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (6, 1, 4, 4), dtype=torch.uint8)
    classes = torch.tensor([0, 1, 2, 0, 1, 2])
    images = Images(pixels, classes)
    data = Labelled(images, images, ("a", "b", "c"), (0.5,), (0.25,))
    student, teacher = (
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)) for _ in "12"
    )
    settings = vit_qat.VitQatSettings(distill=0.3, shift=0, flip=False, smoothing=0.0)
    found = vit_qat.taught_by(teacher, data, settings)(student, (pixels, classes))
    logits, answer = student(data.normalized(pixels)), teacher(data.normalized(pixels))
    p, q = answer.softmax(1), logits.softmax(1)
    apart = (p * (p / q).log()).sum()
    expected = 0.7 * F.cross_entropy(logits, classes, reduction="sum") + 0.3 * apart
    torch.testing.assert_close(found, expected)


# Which channels matter


def small_network() -> tuple[torch.nn.Module, tuple[channel_groups.ChannelGroup, ...]]:
    torch.manual_seed(0)
    shape = (1, 8, 8)
    config = residual.config(shape, 3, kind="basic", widths=(4, 6), blocks=(1, 1))
    network = residual.build(config).eval()
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.weight.uniform_(-1, 1)
                part.bias.uniform_(-1, 1)
    return network, channel_groups.find(network, shape, "head")


def test_taylor_is_the_squared_gradient_of_a_gate() -> None:
    """Molchanov et al. 2019, section 3.2: a gate of 1 behind each batch norm of the group."""
    network, groups = small_network()
    images, classes = torch.randn(8, 1, 8, 8), torch.arange(8) % 3

    def loss(model: torch.nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(images), classes)

    found = channel_groups.scores("taylor", network, groups, [loss])
    for group in groups:
        gate = torch.ones(group.width, requires_grad=True)
        hooks = [
            network.get_submodule(name).register_forward_hook(
                lambda module, given, made, gate=gate: made * gate.view(1, -1, 1, 1)
            )
            for name in group.norms
        ]
        (gradient,) = torch.autograd.grad(loss(network), gate)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(found[group.name], gradient.square(), rtol=1e-4, atol=1e-9)


def test_sizes_of_kernels_scales_and_activations_are_what_they_are_called() -> None:
    network, groups = small_network()
    (stream,) = (group for group in groups if "stem.conv" in group.makers)
    assert len(stream.makers) == 2  # a sum over both
    images = torch.randn(5, 1, 8, 8)
    seen = []
    for name in stream.norms:
        network.get_submodule(name).register_forward_hook(
            lambda module, given, made: seen.append(made.detach())
        )
    network(images)
    makers = [network.get_submodule(name).weight.detach() for name in stream.makers]
    scales = [network.get_submodule(name).weight.detach() for name in stream.norms]
    expected = {
        "l1": sum(each.abs().sum((1, 2, 3)) for each in makers),
        "bn": sum(each.abs() for each in scales),
        "activation": sum(each.abs().mean((0, 2, 3)) for each in seen),
    }
    for criterion, sizes in expected.items():
        found = channel_groups.scores(
            criterion,  # type: ignore[arg-type]
            network,
            groups,
            [lambda model: model(images).sum()],
        )
        torch.testing.assert_close(found[stream.name], sizes / sizes.mean())
