"""Parts taken out of a small Llama: those that count for least, and no change where none counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from edgekit.errors import RecipeError
from edgekit.training import layer_drop, layer_pass, narrow_layers, wanda
from edgekit.training.layer_pass import DOWN, GATE, KEY, MATRICES, OUT, QUERY, UP, VALUE

LAYERS, HEADS, GROUPS, WIDTH, INNER, VOCAB = 4, 4, 2, 32, 48, 61


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        initializer_range=0.2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (6, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(ids).logits
    return found


def weight(model: Any, number: int, name: str) -> torch.Tensor:
    found: torch.Tensor = model.model.layers[number].get_submodule(name).weight.data
    return found


# One layer after the other


def test_what_goes_through_the_layers_is_what_the_model_makes(
    llama: Any, ids: torch.Tensor
) -> None:
    with torch.no_grad():
        expected = llama(ids, output_hidden_states=True).hidden_states
    stream = layer_pass.Stream(llama, ids)
    for number, layer in enumerate(llama.model.layers):
        torch.testing.assert_close(stream.hidden, expected[number])
        stream.hidden = stream.after(layer)
    flat = logits(llama, ids)[:, :-1].flatten(0, 1)
    loss = layer_pass.loss_behind(llama, stream.hidden, ids)
    assert loss == pytest.approx(float(F.cross_entropy(flat, ids[:, 1:].flatten())), rel=1e-5)


def test_what_enters_a_matrix_is_summed_over_all_pieces(llama: Any, ids: torch.Tensor) -> None:
    seen = []
    down = llama.model.layers[0].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    logits(llama, ids)
    hook.remove()
    stream = layer_pass.Stream(llama, ids)
    found = stream.entering(llama.model.layers[0], [DOWN], lambda x: x.square().sum(0))[DOWN]
    torch.testing.assert_close(found, seen[0].square().sum((0, 1)))


@pytest.mark.parametrize(("kind", "words"), [("biased", "with a bias"), ("gpt2", "of a gpt2")])
def test_other_models_are_refused(kind: str, words: str) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attention_bias=True))
    with pytest.raises(RecipeError, match=words):
        layer_pass.check(model)


# Layers


def test_a_model_of_all_its_layers_is_the_same(llama: Any, ids: torch.Tensor) -> None:
    again = layer_pass.with_layers(llama, range(LAYERS))
    assert torch.equal(logits(again, ids), logits(llama, ids))


@pytest.mark.parametrize("choose", [layer_drop.by_influence, layer_drop.by_loss])
def test_layers_that_do_nothing_go_and_nothing_changes(
    llama: Any, ids: torch.Tensor, choose: Callable[..., list[int]]
) -> None:
    for number in (1, 2):
        weight(llama, number, OUT).zero_()
        weight(llama, number, DOWN).zero_()
    influences = layer_drop.influences(llama, ids)
    assert influences[1] == pytest.approx(0, abs=1e-5) and min(influences[0], influences[3]) > 0.01
    if choose is layer_drop.by_influence:
        assert choose(llama, ids, 2) == [0, 3]
        small = layer_pass.with_layers(llama, [0, 3])
        torch.testing.assert_close(logits(small, ids), logits(llama, ids))


def test_influence_is_how_far_a_token_turns_on_its_way_through_a_layer(
    llama: Any, ids: torch.Tensor
) -> None:
    with torch.no_grad():
        states = llama(ids, output_hidden_states=True).hidden_states
    found = layer_drop.influences(llama, ids)
    for number in range(LAYERS - 1):  # behind the last one transformers puts the norm
        before, after = states[number].flatten(0, 1), states[number + 1].flatten(0, 1)
        lengths = before.norm(dim=1) * after.norm(dim=1)
        expected = 1 - ((before * after).sum(1) / lengths).mean()
        assert found[number] == pytest.approx(float(expected), abs=1e-5)


def test_by_loss_each_layer_goes_that_the_text_misses_least(llama: Any, ids: torch.Tensor) -> None:
    kept = list(range(LAYERS))
    for _ in range(2):
        losses = {}
        for number in kept:
            rest = layer_pass.with_layers(llama, [each for each in kept if each != number])
            flat = logits(rest, ids)[:, :-1].flatten(0, 1)
            losses[number] = float(F.cross_entropy(flat, ids[:, 1:].flatten()))
        kept.remove(min(losses, key=losses.__getitem__))
    assert layer_drop.by_loss(llama, ids, 2) == kept


# Single weights


def test_the_scores_are_of_what_enters_after_the_layers_before_were_pruned(
    llama: Any, ids: torch.Tensor
) -> None:
    pruned = wanda.by_activation(llama, ids, wanda.of_each_output(0.5))
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        pruned.model.layers[2]
        .get_submodule(name)
        .register_forward_pre_hook(
            lambda module, given, name=name: seen.update({name: given[0].flatten(0, 1)})
        )
        for name in (QUERY, GATE)
    ]
    logits(pruned, ids)
    for hook in hooks:
        hook.remove()
    # Only what enters attention: the feed-forward part was scored before attention had its zeros.
    scores = weight(llama, 2, QUERY).abs() * seen[QUERY].norm(dim=0)
    median = scores.median(dim=1, keepdim=True).values
    assert torch.equal(weight(pruned, 2, QUERY) != 0, scores > median)
    for name in MATRICES:
        zeros = (weight(pruned, 3, name) == 0).sum(1)
        assert bool((zeros == weight(pruned, 3, name).shape[1] // 2).all())
        kept = weight(pruned, 3, name) != 0
        assert torch.equal(weight(pruned, 3, name)[kept], weight(llama, 3, name)[kept])
    assert wanda.zeros_share(pruned) == 0.5 and wanda.zeros_share(llama) == 0


def test_two_of_every_four_stay_and_they_score_the_highest() -> None:
    scores = torch.rand(5, 16, generator=torch.Generator().manual_seed(2))
    mask = wanda.n_of_m(2, 4)(scores).unflatten(1, (-1, 4))
    fours = scores.unflatten(1, (-1, 4))
    assert bool((mask.sum(2) == 2).all())
    kept, gone = fours.masked_fill(mask == 0, 9).amin(2), fours.masked_fill(mask == 1, 0).amax(2)
    assert bool((kept >= gone).all())
    with pytest.raises(RecipeError, match="no multiple of 4"):
        wanda.n_of_m(2, 4)(torch.rand(2, 6))


def test_by_size_the_smallest_of_a_whole_matrix_go(llama: Any) -> None:
    pruned = wanda.by_size(llama, wanda.of_the_matrix(0.25))
    before, after = weight(llama, 0, UP).abs(), weight(pruned, 0, UP)
    assert float(before[after == 0].max()) <= float(before[after != 0].min())
    assert wanda.zeros_share(pruned) == pytest.approx(0.25, abs=0.01)
    assert wanda.zeros_share(llama) == 0


# Channels and heads


def test_channels_that_are_twins_go_and_their_twins_stand_in_for_them(
    llama: Any, ids: torch.Tensor
) -> None:
    for layer in llama.model.layers:
        for name, factor in ((GATE, 1.0), (UP, 3.0)):
            part = layer.get_submodule(name).weight.data
            part[1::2] = factor * part[::2]
    narrow = narrow_layers.by_activation(llama, ids, INNER // 2, GROUPS)
    by_size: Any = narrow_layers.by_size(llama, INNER // 2, GROUPS)
    assert narrow.config.intermediate_size == by_size.config.intermediate_size == INNER // 2
    whole = logits(llama, ids)
    error = (logits(narrow, ids) - whole).square().mean() / whole.square().mean()
    assert float(error) < 1e-3
    assert float((logits(by_size, ids) - whole).square().mean() / whole.square().mean()) > 0.05


@pytest.mark.parametrize("way", ["activation", "size"])
def test_heads_that_nothing_reads_go_and_nothing_changes(
    llama: Any, ids: torch.Tensor, way: str
) -> None:
    for number in range(LAYERS):
        dead = number % GROUPS
        weight(llama, number, OUT).unflatten(1, (GROUPS, -1))[:, dead] = 0
    if way == "activation":
        narrow: Any = narrow_layers.by_activation(llama, ids, INNER, 1)
    else:
        narrow = narrow_layers.by_size(llama, INNER, 1)
    config = narrow.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert weight(narrow, 0, KEY).shape == weight(narrow, 0, VALUE).shape == (8, WIDTH)
    torch.testing.assert_close(logits(narrow, ids), logits(llama, ids), rtol=1e-3, atol=1e-3)


def test_channels_that_carry_nothing_go_however_large_their_weights_are(
    llama: Any, ids: torch.Tensor
) -> None:
    for number in range(LAYERS):
        weight(llama, number, UP)[:8] = 0
        weight(llama, number, DOWN)[:, :8] *= 10
        weight(llama, number, GATE)[:8] *= 100
    narrow = narrow_layers.by_activation(llama, ids, INNER - 8, GROUPS)
    torch.testing.assert_close(logits(narrow, ids), logits(llama, ids), rtol=1e-2, atol=1e-2)


def test_what_stays_is_the_least_squares_solution_of_the_best_choice() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    matrix = torch.randn(5, 6, generator=generator)
    kept, found = narrow_layers.without(matrix, x.T @ x, 1, 5)

    def error(numbers: torch.Tensor, columns: torch.Tensor) -> float:
        return float((x @ matrix.T - x[:, numbers] @ columns.T).square().sum())

    errors = []
    for gone in range(6):
        numbers = torch.tensor([each for each in range(6) if each != gone])
        best = torch.linalg.lstsq(x[:, numbers], x @ matrix.T).solution.T
        errors.append(error(numbers, best))
    gone = int(torch.tensor(errors).argmin())
    assert kept.tolist() == [each for each in range(6) if each != gone]
    assert error(kept, found) == pytest.approx(errors[gone], rel=0.05)
    assert error(kept, found) < error(kept, matrix[:, kept])


@pytest.mark.parametrize("size", [1, 2])
def test_each_part_that_goes_is_the_cheapest_of_what_is_left(size: int) -> None:
    """Three of six go: after each, what the others are worth is told anew (ZipLM)."""
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        inputs = 6 * size
        x = torch.randn(300, inputs, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
        matrix = torch.randn(5, inputs, generator=generator, dtype=torch.float64)
        left = list(range(6))
        for _ in range(3):
            errors = {}
            for part in left:
                rest = [p * size + n for p in left if p != part for n in range(size)]
                solved = torch.linalg.lstsq(x[:, rest], x @ matrix.T)
                missed = x[:, rest] @ solved.solution - x @ matrix.T
                errors[part] = float(missed.square().sum())
            left.remove(min(errors, key=errors.__getitem__))
        kept, columns = narrow_layers.without(matrix, x.T @ x, size, 3)
        rest = [p * size + n for p in left for n in range(size)]
        assert kept.tolist() == rest
        best = torch.linalg.lstsq(x[:, rest], x @ matrix.T).solution.T
        torch.testing.assert_close(columns, best, rtol=0.05, atol=0.05)
