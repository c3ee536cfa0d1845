"""Which layers of a language model to leave out: by what they change, or by the loss without them.

Knows layers and what goes through them; never how the model is used without them.
"""

from __future__ import annotations

from typing import Any

import torch

from edgekit.training.layer_pass import Stream, loss_behind


def by_influence(model: Any, ids: torch.Tensor, count: int) -> list[int]:
    """The numbers of the layers that stay when the ``count`` go that turn the hidden states least:
    their block influence is 1 less the mean cosine of what enters and what leaves (Men et al. 2024,
    "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", equation 1).
    ``ids`` are int64 [pieces, length].
    """
    found = influences(model, ids)
    gone = sorted(range(len(found)), key=found.__getitem__)[:count]
    return [number for number in range(len(found)) if number not in gone]


def influences(model: Any, ids: torch.Tensor) -> list[float]:
    """The block influence of each layer."""
    stream = Stream(model, ids)
    found = []
    for layer in model.model.layers:
        after = stream.after(layer)
        cosines = torch.nn.functional.cosine_similarity(stream.hidden, after, dim=-1)
        found.append(1.0 - float(cosines.double().mean()))
        stream.hidden = after
    return found


def by_loss(model: Any, ids: torch.Tensor, count: int) -> list[int]:
    """The numbers of the layers that stay when ``count`` times that one goes without which the loss
    on ``ids`` is the least (Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy
    Verification and Elimination of Transformer Blocks", algorithm 1).
    """
    layers = model.model.layers
    kept = list(range(len(layers)))
    for _ in range(count):
        losses = {}
        stream = Stream(model, ids)
        for place, number in enumerate(kept):  # what comes before it is computed once for all
            entering = stream.hidden
            for behind in kept[place + 1 :]:
                stream.hidden = stream.after(layers[behind])
            losses[number] = loss_behind(model, stream.hidden, ids)
            stream.hidden = entering
            stream.hidden = stream.after(layers[number])
        kept.remove(min(losses, key=losses.__getitem__))
    return kept
