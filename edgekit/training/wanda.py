"""Single weights of a language model set to zero: by their size, or by what they do to a text.

Knows matrices, and what enters them; never a clock: no engine here skips zeros, which reports say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from edgekit.errors import RecipeError
from edgekit.training.layer_pass import MATRICES, TOGETHER, Stream

# Scores float32 [outputs, inputs] of a matrix -> a mask of the same shape, 1 keeps.
Rule = Callable[[torch.Tensor], torch.Tensor]


def by_activation(model: Any, ids: torch.Tensor, rule: Rule) -> Any:
    """A copy of the model with zeros where ``rule`` puts them, by scores |W_ij| ||X_j||_2 (Sun et
    al. 2024, "A Simple and Effective Pruning Approach for Large Language Models" (Wanda), section
    3, equation 1): X_j is what enters input j for the pieces ``ids``, int64 [pieces, length], which
    have gone through the layers before with their zeros. Nothing is trained.
    """
    pruned = copy.deepcopy(model)
    stream = Stream(pruned, ids)
    firsts = [names[0] for names in TOGETHER]
    for layer in pruned.model.layers:
        squares = stream.entering(layer, firsts, lambda x: x.square().sum(0))
        for names in TOGETHER:
            norms = squares[names[0]].sqrt()
            for name in names:
                weight = layer.get_submodule(name).weight.data
                weight.mul_(rule(weight.abs() * norms))
        stream.hidden = stream.after(layer)
    return pruned


def by_size(model: Any, rule: Rule) -> Any:
    """A copy of the model with zeros where ``rule`` puts them, by scores |W_ij| (Han et al. 2015,
    "Learning both Weights and Connections for Efficient Neural Networks", section 3).
    """
    pruned = copy.deepcopy(model)
    for layer in pruned.model.layers:
        for name in MATRICES:
            weight = layer.get_submodule(name).weight.data
            weight.mul_(rule(weight.abs()))
    return pruned


def of_each_output(share: float) -> Rule:
    """Leaves out ``share`` of each output's weights, those with the least scores (Wanda, section 3,
    "Comparison group").
    """

    def mask(scores: torch.Tensor) -> torch.Tensor:
        kept = torch.ones_like(scores)
        least = scores.topk(round(share * scores.shape[1]), dim=1, largest=False).indices
        return kept.scatter_(1, least, 0.0)

    return mask


def of_the_matrix(share: float) -> Rule:
    """Leaves out ``share`` of all weights of a matrix, those with the least scores."""

    def mask(scores: torch.Tensor) -> torch.Tensor:
        least = scores.flatten().topk(round(share * scores.numel()), largest=False).indices
        return torch.ones(scores.numel()).to(scores).scatter_(0, least, 0.0).view_as(scores)

    return mask


def n_of_m(n: int, m: int) -> Rule:
    """Keeps the ``n`` best of every ``m`` weights that stand beside each other along the inputs
    (Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", section 3).
    """

    def mask(scores: torch.Tensor) -> torch.Tensor:
        if scores.shape[1] % m:
            raise RecipeError(f"{scores.shape[1]} inputs are no multiple of {m}")
        groups = scores.unflatten(1, (-1, m))
        best = groups.topk(n, dim=2).indices
        return torch.zeros_like(groups).scatter_(2, best, 1.0).view_as(scores)

    return mask


def zeros_share(model: Any) -> float:
    """The share of zeros in the matrices of the layers."""
    weights = [
        layer.get_submodule(name).weight for layer in model.model.layers for name in MATRICES
    ]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return zeros / sum(int(weight.numel()) for weight in weights)
