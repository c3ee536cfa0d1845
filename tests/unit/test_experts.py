"""A mixture of experts: each token's few, the room of each, and the loss that spreads the work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgekit.training.experts import SparseExperts, balance_of, balances


def layer(experts: int = 4, chosen: int = 2, capacity: float = 1.25) -> SparseExperts:
    torch.manual_seed(0)
    made = SparseExperts(16, 24, experts, chosen, capacity)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return made


def token_by_token(made: SparseExperts, x: torch.Tensor) -> torch.Tensor:
    """The formula, without any sorting."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        scores, picks = made.gate(token).topk(made.chosen)
        row = torch.zeros_like(token)
        for weight, pick in zip(scores.softmax(-1), picks.tolist(), strict=True):
            inner = F.silu(made.gate_proj[pick] @ token) * (made.up_proj[pick] @ token)
            row = row + weight * (made.down_proj[pick] @ inner)
        rows.append(row)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("chosen", [1, 2, 4])
def test_it_computes_mixtral_s_formula(chosen: int) -> None:
    made, x = layer(chosen=chosen).eval(), torch.randn(3, 5, 16)
    torch.testing.assert_close(made(x), token_by_token(made, x), rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_formula() -> None:
    made, x = layer(capacity=4.0).train(), torch.randn(2, 6, 16)
    found = torch.autograd.grad(made(x).square().sum(), list(made.parameters()))
    wanted = torch.autograd.grad(token_by_token(made, x).square().sum(), list(made.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_expert_without_room_lets_the_later_tokens_pass() -> None:
    made = layer(experts=2, chosen=1, capacity=1.0).train()
    with torch.no_grad():
        made.gate.weight.zero_()
        made.gate.weight[0, 0] = 10.0  # all tokens with a positive first channel want expert 0
    x = torch.randn(1, 8, 16)
    x[..., 0] = 1.0
    found = made(x)
    torch.testing.assert_close(found[:, :4], token_by_token(made, x)[:, :4], rtol=1e-5, atol=1e-6)
    assert not found[:, 4:].any() and float(made.dropped) == 0.5
    assert made.eval()(x)[:, 4:].any()


def test_first_choices_go_before_second_ones() -> None:
    made = layer(experts=2, chosen=2, capacity=0.5).train()
    with torch.no_grad():
        made.gate.weight.zero_()
        made.gate.weight[0, 0] = 10.0
    x = torch.randn(1, 4, 16)
    x[0, :, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0])  # 0 first for two, 1 first for two
    shares = made.gate(x).softmax(-1)
    best = shares.max(-1).values
    found, wanted = made(x), torch.zeros_like(x)
    for place, pick in enumerate([0, 0, 1, 1]):
        token = x[0, place]
        inner = F.silu(made.gate_proj[pick] @ token) * (made.up_proj[pick] @ token)
        wanted[0, place] = best[0, place] * (made.down_proj[pick] @ inner)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_balance_is_one_where_all_are_equally_busy_and_grows_to_the_number_of_experts() -> None:
    even = torch.full((8, 4), 0.25)
    assert balance_of(even, torch.tensor([4, 4, 4, 4])).item() == pytest.approx(1.0)
    one = torch.tensor([[1.0, 0, 0, 0]]).repeat(8, 1)
    assert balance_of(one, torch.tensor([16, 0, 0, 0])).item() == pytest.approx(4.0)


def test_the_loss_of_balance_makes_them_equally_busy() -> None:
    made, x = layer(experts=8).train(), torch.randn(4, 32, 16)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    values = []
    for _ in range(60):
        made(x)
        loss = balances(made)
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[0] > 1.1 and values[-1] < 1.03
