"""A language model with narrower layers: fewer feed-forward channels, fewer groups of heads.

Knows which inputs of a matrix the others can stand in for; never how many are to go, nor what the
narrower model is used for.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from edgekit.training.layer_pass import DOWN, GATE, KEY, OUT, QUERY, UP, VALUE, Stream, made_anew

_DAMPING = 1e-4  # of the mean square: so that what never varies has an inverse


def by_activation(model: Any, ids: torch.Tensor, inner: int, groups: int) -> torch.nn.Module:
    """The model with ``inner`` feed-forward channels and ``groups`` groups of heads (a key, a
    value, and the queries that read them) in each layer. Those go that the rest can best stand in
    for, in what the layer's last matrices make of the text ``ids`` (int64 [pieces, length]); the
    rest then does stand in for them. Nothing is trained.
    """
    whole = copy.deepcopy(model)
    stream = Stream(whole, ids)
    state = whole.state_dict()
    for number, layer in enumerate(whole.model.layers):
        # Attention first: what enters the feed-forward part is what narrower attention leaves.
        for name, size, keep in _parts(whole.config, inner, groups):
            if keep * size == layer.get_submodule(name).in_features:
                continue
            products = stream.entering(layer, [name], lambda x: x.T @ x)[name]
            weight = layer.get_submodule(name).weight.data
            kept, found = without(weight, products, size, keep)
            narrow = torch.zeros_like(weight)
            narrow[:, kept] = found
            weight.copy_(narrow)  # as wide as before, to go on with
            state |= _cut(state, number, name, kept, whole.config)
        stream.hidden = stream.after(layer)
    return _made(whole, state, inner, groups)


def by_size(model: Any, inner: int, groups: int) -> torch.nn.Module:
    """The same sizes, those parts kept whose weights are the largest: products of the norms of what
    leads into a channel and out of it; of a group of heads the norm of what leads out.
    """
    state = model.state_dict()
    for number, layer in enumerate(model.model.layers):
        weights = {name: layer.get_submodule(name).weight for name in (GATE, UP, DOWN, OUT)}
        norms = weights[GATE].norm(dim=1) * weights[UP].norm(dim=1) * weights[DOWN].norm(dim=0)
        out = weights[OUT].unflatten(1, (model.config.num_key_value_heads, -1)).norm(dim=(0, 2))
        for (name, size, keep), sizes in zip(
            _parts(model.config, inner, groups), (out, norms), strict=True
        ):
            kept = _inputs(sizes.topk(keep).indices.sort().values, size)
            state |= _cut(state, number, name, kept, model.config)
    return _made(model, state, inner, groups)


def _parts(config: Any, inner: int, groups: int) -> list[tuple[str, int, int]]:
    """A matrix, how many of its inputs go together, and how many of such stay."""
    head = config.head_dim * config.num_attention_heads // config.num_key_value_heads
    return [(OUT, head, groups), (DOWN, 1, inner)]


def _cut(
    state: dict[str, torch.Tensor], number: int, name: str, kept: torch.Tensor, config: Any
) -> dict[str, torch.Tensor]:
    """The matrices of layer ``number`` without what leads to the inputs of ``name`` that go, and
    without these.
    """
    prefix = f"model.layers.{number}."
    found = {f"{prefix}{name}.weight": state[f"{prefix}{name}.weight"][:, kept]}
    if name == DOWN:
        makers = {GATE: kept, UP: kept}
    else:
        queries = config.num_attention_heads // config.num_key_value_heads
        heads = kept.view(-1, config.head_dim)[:, 0] // config.head_dim
        groups = (heads // queries).unique()
        kv = _inputs(groups, config.head_dim)
        makers = {QUERY: kept, KEY: kv, VALUE: kv}
    rows = {f"{prefix}{maker}.weight": rows for maker, rows in makers.items()}
    return found | {maker: state[maker][numbers] for maker, numbers in rows.items()}


def _made(model: Any, state: dict[str, torch.Tensor], inner: int, groups: int) -> torch.nn.Module:
    config = model.config
    changes = {
        "intermediate_size": inner,
        "num_key_value_heads": groups,
        "num_attention_heads": groups * config.num_attention_heads // config.num_key_value_heads,
        "head_dim": config.head_dim,
    }
    return made_anew(model, changes, state)


def _inputs(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """The inputs of parts that have ``size`` of them each."""
    return (numbers[:, None] * size + torch.arange(size, device=numbers.device)).flatten()


def without(
    weight: torch.Tensor, products: torch.Tensor, size: int, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which inputs of ``weight`` [outputs, inputs] stay, sorted, and its columns for them: ``keep``
    parts of ``size`` inputs each. ``products`` [inputs, inputs] is the sum of x x^T.

    Part after part goes whose loss adds least to the squared error of what the matrix makes, the
    others having been set to stand in for it (Kurtic et al. 2023, "ZipLM: Inference-Aware
    Structured Pruning of Language Models", section 3.1, equations 2 and 3). What stays is then
    solved for at once: least squares (He et al. 2017, "Channel Pruning for Accelerating Very Deep
    Neural Networks", section 3.1).
    """
    count = weight.shape[1] // size
    level = _DAMPING * products.diagonal().mean().clamp(min=1e-12)
    second = (products + level * torch.eye(len(products)).to(products)).double()
    inverse = torch.linalg.inv(second).to(weight.dtype)
    left = weight.T.contiguous()  # [inputs, outputs]
    gone = torch.zeros(count, dtype=torch.bool, device=weight.device)
    whole = torch.eye(size).to(weight)
    for _ in range(count - keep):
        blocks = inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        turned = torch.linalg.inv(torch.where(gone[:, None, None], whole, blocks))
        columns = left.view(count, size, -1)
        errors = (columns @ columns.mT * turned).sum((1, 2))
        part = int(torch.where(gone, torch.inf, errors).argmin())
        at = slice(part * size, (part + 1) * size)
        rows = turned[part] @ inverse[at]
        left.addmm_(rows.T, left[at].clone(), alpha=-1)
        inverse.addmm_(inverse[:, at].clone(), rows, alpha=-1)
        gone[part] = True
    kept = _inputs((~gone).nonzero().flatten(), size)
    solved = torch.linalg.solve(second[kept][:, kept], second[kept] @ weight.double().T)
    return kept, solved.T.to(weight.dtype)
