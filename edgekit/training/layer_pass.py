"""Text on its way through a Llama of transformers, one layer after the other.

Knows hidden states, the names of a layer's matrices, and how layers make up a model; never what a
layer or a weight is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from edgekit.errors import RecipeError

QUERY, KEY, VALUE, OUT = (f"self_attn.{part}_proj" for part in "qkvo")
GATE, UP, DOWN = (f"mlp.{part}_proj" for part in ("gate", "up", "down"))
MATRICES = (QUERY, KEY, VALUE, OUT, GATE, UP, DOWN)
# Matrices that take the same values: what enters the first of each is told for all.
TOGETHER = ((QUERY, KEY, VALUE), (OUT,), (GATE, UP), (DOWN,))
_AT_ONCE = 4  # pieces
_TYPE = "llama"


def check(model: Any) -> None:
    """Raises RecipeError for another architecture, and for a Llama with biases."""
    if model.config.model_type != _TYPE:
        raise RecipeError(
            f"the layers of a {model.config.model_type} cannot be pruned here", hint="a Llama"
        )
    if any(name.endswith(".bias") for name, _ in model.named_parameters()):
        raise RecipeError("matrices with a bias cannot be pruned here")


class Stream:
    """``hidden`` float32 [pieces, length, width] is what enters the next layer: of pieces of text
    ``ids`` int64 [pieces, length], first what the embedding makes of them.
    """

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        with torch.no_grad():
            self.hidden: torch.Tensor = model.model.embed_tokens(ids)
            places = torch.arange(ids.shape[1], device=ids.device)[None]
            self._turns = model.model.rotary_emb(self.hidden, position_ids=places)

    @torch.no_grad()
    def after(self, layer: Any) -> torch.Tensor:
        """What ``layer`` makes of it, of the same shape."""
        return torch.cat([self._through(layer, part) for part in self.hidden.split(_AT_ONCE)])

    def _through(self, layer: Any, part: torch.Tensor) -> torch.Tensor:
        found = layer(part, position_embeddings=self._turns)
        return found if isinstance(found, torch.Tensor) else found[0]

    @torch.no_grad()
    def entering(
        self, layer: Any, names: Sequence[str], take: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The sum of ``take(x)`` over all pieces, for each of the matrices ``names``: x is what
        enters it, float32 [tokens, inputs].
        """
        found: dict[str, torch.Tensor] = {}

        def add(name: str, module: Any, given: tuple[torch.Tensor, ...]) -> None:
            sums = take(given[0].float().flatten(0, -2))
            found[name] = found[name] + sums if name in found else sums

        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(partial(add, name))
            for name in names
        ]
        try:
            for part in self.hidden.split(_AT_ONCE):
                self._through(layer, part)
        finally:
            for hook in hooks:
                hook.remove()
        return found


@torch.no_grad()
def loss_behind(model: Any, hidden: torch.Tensor, ids: torch.Tensor) -> float:
    """Nats a token that the model gives to what follows each of ``ids`` but the last, where
    ``hidden`` is what left its last layer.
    """
    logits = model.lm_head(model.model.norm(hidden[:, :-1])).float()
    wanted = ids[:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted))


def made_anew(
    model: Any, changes: Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> torch.nn.Module:
    """A model like ``model`` with ``changes`` in its config and the weights ``state``, on the same
    device, in evaluation mode.
    """
    body = model.config.to_dict() | dict(changes)
    body.pop("layer_types", None)  # as many as layers: made of their number
    config = type(model.config).from_dict(body)
    attention = model.config._attn_implementation
    made = type(model)._from_config(config, attn_implementation=attention).to(model.device)
    made.config.use_cache = False
    made.load_state_dict(dict(state))
    found: torch.nn.Module = made.eval()
    return found


def with_layers(model: Any, kept: Sequence[int]) -> torch.nn.Module:
    """The model with the layers of these numbers alone, in this order."""
    prefix = "model.layers."
    whole = model.state_dict()
    state = {name: each for name, each in whole.items() if not name.startswith(prefix)}
    for place, number in enumerate(kept):
        old, new = f"{prefix}{number}.", f"{prefix}{place}."
        state |= {
            new + name.removeprefix(old): each
            for name, each in whole.items()
            if name.startswith(old)
        }
    return made_anew(model, {"num_hidden_layers": len(kept)}, state)
