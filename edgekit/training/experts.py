"""A mixture of experts in the place of a feed-forward part: each token goes through a few of many.

Knows tokens, a router and its experts; never what surrounds them. The function is Mixtral's (Jiang
et al. 2024, section 2.1): the best ``chosen`` experts of a token, weighed by the softmax of their
own scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn


class SparseExperts(nn.Module):
    """[batch, length, width] -> the same. After each call in training ``balance`` is the loss that
    keeps the experts equally busy, and ``dropped`` the share of choices that found no room.

    In training an expert takes at most ``capacity`` times its fair share of a batch's choices, the
    first choices of all tokens before their second ones, and what is over skips it (Lepikhin et al.
    2021, GShard, section 2.2; Fedus et al. 2022, Switch Transformers, section 2.2, equation 3).
    Otherwise there is no limit: answers do not depend on who else asks.
    """

    def __init__(self, width: int, inner: int, experts: int, chosen: int, capacity: float) -> None:
        super().__init__()
        self.chosen, self.capacity = chosen, capacity
        self.gate = nn.Linear(width, experts, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.up_proj = nn.Parameter(torch.empty(experts, inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.balance = torch.zeros(())
        self.dropped = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        experts = len(self.gate_proj)
        shares = self.gate(tokens).float().softmax(-1)
        best, picks = shares.topk(self.chosen, dim=-1)
        weights = best / best.sum(-1, keepdim=True)
        # First choices of all tokens, then second ones; sorted by expert, equal ones in order.
        flat = picks.T.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=experts)
        room = math.ceil(self.capacity * len(flat) / experts) if self.training else len(flat)
        if self.training:
            self.balance = balance_of(shares, counts)
            self.dropped = (counts - room).clamp(min=0).sum() / len(flat)
        token = order % len(tokens)
        made = []
        for number, (start, count) in enumerate(
            zip((counts.cumsum(0) - counts).tolist(), counts.tolist(), strict=True)
        ):
            mine = tokens[token[start : start + min(count, room)]]
            inner = F.silu(F.linear(mine, self.gate_proj[number]))
            inner = inner * F.linear(mine, self.up_proj[number])
            found = F.linear(inner, self.down_proj[number])
            made.append(F.pad(found, (0, 0, 0, count - len(mine))))
        # Back to the order of the choices: a permutation, so that no sum depends on chance.
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        chosen = torch.cat(made)[back].view(self.chosen, *tokens.shape)
        mixed = (chosen * weights.T[..., None].to(chosen.dtype)).sum(0)
        return mixed.view(x.shape)


def balance_of(shares: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """experts * sum over i of f_i * P_i: f_i the share of the choices that fell on expert i, P_i
    the mean of its ``shares`` (float32 [tokens, experts]); 1 where all are equally busy (Fedus et
    al. 2022, section 2.2, equations 4 to 6, without alpha).
    """
    picked = counts.to(shares.dtype) / counts.sum()
    return shares.shape[1] * (picked * shares.mean(0)).sum()


def balances(model: nn.Module) -> torch.Tensor:
    """The sum of ``balance`` over the layers of ``model``."""
    return torch.stack([m.balance for m in model.modules() if isinstance(m, SparseExperts)]).sum()


# What Mixtral's folders call an expert's matrices.
_FOLDER_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def unstacked(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with each expert's matrices under the names that Mixtral's folders have."""
    found = {}
    for name, each in state.items():
        parent, _, last = name.rpartition(".")
        if each.dim() == 3 and last in _FOLDER_NAMES:
            for number, matrix in enumerate(each):
                place = f"{parent}.experts.{number}.{_FOLDER_NAMES[last]}.weight"
                found[place] = matrix.contiguous()
        else:
            found[name] = each
    return found
