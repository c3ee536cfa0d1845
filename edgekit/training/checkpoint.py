"""A run's state in one safetensors file: weights, optimizer, averages, curve; whole or absent.

Knows torch's state dicts, sharded or not; never a task, and no order of the work.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from edgekit import _fs
from edgekit.errors import CorruptArtifactError, OutOfSpaceError
from edgekit.formats import safetensors
from edgekit.training.average import Average
from edgekit.training.optimizer import Optimizers

Tensors = dict[str, torch.Tensor]
_MODEL, _OPTIMIZER, _AVERAGE, _CURVE = "model.", "optimizer.", "average.", "curve"
_META = "edgekit"


@dataclass
class Progress:
    """Where a run stands: ``step`` steps are done, in ``seconds`` of work so far. ``best`` is the
    lowest loss of an evaluation and ``waited`` the evaluations since. ``evaluations`` holds the
    figures of each, with its step. ``needed_bytes`` is what a step should need beside the weights
    and ``taken_bytes`` what the first two took, None where the system does not tell.
    """

    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    waited: int = 0
    done: bool = False
    evaluations: list[dict[str, float]] = field(default_factory=list)
    needed_bytes: int = 0
    taken_bytes: int | None = None


def model_state(model: torch.nn.Module, *, everywhere: bool = False) -> Tensors:
    """The whole state of a model on the CPU: on the main process, and with ``everywhere`` on the
    others too, where it is else empty if the model is distributed. Every process must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
    found = get_model_state_dict(model, options=options)
    # Tied weights are one tensor under two names, which the format does not take.
    return {name: each.detach().cpu().contiguous().clone() for name, each in found.items()}


def _trained_names(model: torch.nn.Module) -> set[str]:
    """What training changes, weights and statistics: all but frozen weights, which are what the
    recipe built.
    """
    named = model.named_parameters(remove_duplicate=False)
    frozen = {name for name, each in named if not each.requires_grad}
    return {name.removeprefix("module.") for name in model.state_dict() if name not in frozen}


def _trained_state(model: torch.nn.Module) -> Tensors:
    names = _trained_names(model)
    return {name: each for name, each in model_state(model).items() if name in names}


def _set_trained_state(model: torch.nn.Module, state: Tensors) -> None:
    """Every process must call it. Raises ValueError for a state of another model."""
    if other := sorted(_trained_names(model) ^ set(state)):
        raise ValueError(f"it has other weights than the model: {other[:3]}")
    # Frozen weights are missing.
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, state, options=options)


def _optimizer_state(model: torch.nn.Module, optimizers: Optimizers) -> Tensors:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_optimizer_state_dict(model, optimizers, options=options)
    return {
        f"{name}|{key}": torch.as_tensor(value).contiguous()
        for name, each in found.get("state", {}).items()
        for key, value in each.items()
    }


def _set_optimizer_state(model: torch.nn.Module, optimizers: Optimizers, tensors: Tensors) -> None:
    state: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("|")
        state.setdefault(parameter, {})[key] = tensor
    names = {id(each): name for name, each in _named_parameters(model)}
    # What a group says (the rate, the decay) comes from the settings, never from the file.
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        | {"params": [names[id(each)] for each in group["params"]]}
        for optimizer in optimizers
        for group in optimizer.param_groups
    ]
    set_optimizer_state_dict(
        model,
        optimizers,
        {"state": state, "param_groups": groups},
        options=StateDictOptions(full_state_dict=True),
    )
    # The fused step pairs values by their place in memory: those of a weight that lies channels
    # last must lie so too.
    for optimizer in optimizers:
        for parameter, kept in optimizer.state.items():
            for key, value in kept.items():
                if value.shape == parameter.shape and value.stride() != parameter.stride():
                    kept[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _named_parameters(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name.removeprefix("module."), each) for name, each in model.named_parameters()]


def save(
    path: Path,
    progress: Progress,
    model: torch.nn.Module,
    optimizers: Optimizers,
    average: Average,
    curve: torch.Tensor,
    *,
    main: bool,
) -> None:
    """Write the state of a run; an earlier file stays until the new one is whole. Frozen weights
    are not in it: who trains an adapter keeps the adapter.

    ``curve`` is float64 [points, columns]. Every process must call it; ``main`` writes.
    Raises OutOfSpaceError.
    """
    tensors = {_MODEL + name: each for name, each in _trained_state(model).items()}
    for name, each in _optimizer_state(model, optimizers).items():
        tensors[_OPTIMIZER + name] = each
    if average:
        with average.applied():
            averaged = _trained_state(model)
        tensors |= {_AVERAGE + name: each for name, each in averaged.items()}
    if main:
        write(path, tensors | {_CURVE: curve}, asdict(progress))


def load(
    path: Path, model: torch.nn.Module, optimizers: Optimizers, average: Average
) -> tuple[Progress, torch.Tensor]:
    """Set model, optimizers and averaged weights to the state in ``path``; where the run stands and
    its curve are returned. Every process must call it. Raises CorruptArtifactError.
    """
    tensors, body = read(path)
    with _damaged(path):
        if average:
            _set_trained_state(model, _below(_AVERAGE, tensors))
            average.take()
        _set_trained_state(model, _below(_MODEL, tensors))
        _set_optimizer_state(model, optimizers, _below(_OPTIMIZER, tensors))
        return Progress(**body), tensors[_CURVE]


def _below(prefix: str, tensors: Tensors) -> Tensors:
    return {
        name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)
    }


def write(path: Path, tensors: Tensors, body: Mapping[str, Any] | None = None) -> None:
    """A safetensors file that appears whole or not at all. Raises OutOfSpaceError."""
    size_bytes = sum(each.numel() * each.element_size() for each in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        _fs.require_space(path, size_bytes + (1 << 20))
        with _fs.disk_errors(path):
            try:
                # One key alone: the library writes several in an order that changes.
                about = {"format": "pt"} if body is None else {_META: json.dumps(body)}
                partial.touch()
                mode = partial.stat().st_mode
                save_file(tensors, partial, about)
                partial.chmod(mode)  # the library's own lets nobody else read it
            except SafetensorError as error:  # its words for what the system says
                if f"os error {errno.ENOSPC}" not in str(error):
                    raise
                raise OSError(errno.ENOSPC, "No space left on device") from error
            _fs.publish(partial, path)
    except OutOfSpaceError as error:
        raise OutOfSpaceError(
            error.message, hint="free some space and run it again with --resume"
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """What ``write`` wrote, on the CPU. Raises CorruptArtifactError."""
    safetensors.read(path)  # the bounded reader sees it first
    with _damaged(path), safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
        return tensors, {} if about.get("format") == "pt" else json.loads(about[_META])


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """A file of ours that is not as we wrote it."""
    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CorruptArtifactError(
            f"{path} is no checkpoint of this run: {str(error)[:120]}",
            hint="remove it: the run then starts that part again",
        ) from error
