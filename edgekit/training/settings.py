"""What may be set for a run: names, types, defaults, and how ``key=value`` becomes one of them.

Knows no recipe's meaning and no torch: a recipe adds fields of its own to ``Settings``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from edgekit import typed_json
from edgekit.errors import RecipeError
from edgekit.registry import did_you_mean

S = TypeVar("S", bound="Settings")
_LARGEST = 10**12
_MOST = {"seed": 2**63 - 1, "threads": 1024}
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def setting(default: Any, about: str) -> Any:
    """A field of a recipe's settings; ``about`` is what ``edgekit train RECIPE --list`` shows."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Settings:
    """What every run has. Steps are steps of the optimizer, ``batch`` is samples for one of them,
    over all processes and micro-batches together: the same curve on one device or on eight.

    Raises RecipeError for values that make no sense.
    """

    seed: int = setting(0, "decides initial weights, order and augmentation")
    steps: int = setting(1000, "steps of the optimizer")
    batch: int = setting(64, "samples of a step, over all processes")
    accumulate: int = setting(1, "pieces that a process computes its share of a batch in")
    lr: float = setting(1e-3, "highest learning rate")
    min_lr: float = setting(0.0, "lowest learning rate at the end, as a share of lr")
    warmup: float = setting(0.05, "share of the steps in which lr rises from 0")
    schedule: Literal["cosine", "wsd", "constant"] = setting("cosine", "course of lr")
    decay: float = setting(0.2, "wsd: share of the steps in which lr falls")
    weight_decay: float = setting(0.05, "AdamW's, on matrices and kernels alone")
    clip: float = setting(1.0, "largest norm of the gradient; 0 does not clip")
    ema: float = setting(0.0, "decay of the averaged weights; 0 takes the last ones")
    precision: Literal["fp32", "bf16"] = setting("fp32", "of matrix products; weights stay fp32")
    eval_every: int = setting(0, "steps between evaluations; 0: only in the end")
    patience: int = setting(0, "evaluations without a better loss that end a run; 0: never")
    checkpoint_every: int = setting(200, "steps between checkpoints")
    log_every: int = setting(10, "steps that a point of the loss curve averages")
    parallel: Literal["data", "fsdp"] = setting("data", "several processes: copies, or shards")
    device: Literal["auto", "cpu", "gpu"] = setting("auto", "auto takes a GPU where there is one")
    threads: int = setting(0, "of the CPU; 0 leaves them to torch")
    latency: bool = setting(True, "export the results and measure them on this machine")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "checkpoint_every", "log_every"):
            _expect(getattr(self, name) > 0, f"{name} must be more than 0")
        for each in fields(self):  # of every recipe: none has a meaning below 0
            value = getattr(self, each.name)
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, int | float):
                    _expect(one >= 0, f"{each.name} must not be negative")
                if isinstance(one, int):
                    most = _MOST.get(each.name, _LARGEST)
                    _expect(one <= most, f"{each.name} is {most:,} at most")
        for name in ("min_lr", "warmup", "decay"):
            _expect(0 <= getattr(self, name) <= 1, f"{name} is a share from 0 to 1")
        _expect(0 <= self.ema < 1, "ema is 0 or a decay below 1, such as 0.999")
        _expect(not self.patience or self.eval_every > 0, "patience needs eval_every")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` gives equal settings back."""
        return typed_json.write(self)


def _expect(good: bool, what: str) -> None:
    if not good:
        raise RecipeError(what)


def from_dict(kind: type[S], body: Any, where: str) -> S:
    """Settings from JSON data, every key known and typed. Raises RecipeError."""
    try:
        return typed_json.read(kind, body, where)
    except typed_json.Mismatch as error:
        raise RecipeError(str(error)) from None


def with_pairs(settings: S, pairs: Iterable[str]) -> S:
    """``settings`` with every ``key=value`` of ``pairs`` in it.

    Raises RecipeError for an unknown key (with a near one as the hint), a key given twice, a value
    of another type, and values that do not go together.
    """
    kinds = get_type_hints(type(settings))
    changed: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip()
        if not equals:
            raise RecipeError(f"{pair!r:.60} is not key=value", hint="--set steps=500")
        if name not in kinds:
            raise RecipeError(
                f"no setting is called {name!r:.60}", hint=did_you_mean(name, list(kinds))
            )
        if name in changed:
            raise RecipeError(f"{name} is set twice")
        changed[name] = _value(kinds[name], name, text.strip())
    return replace(settings, **changed)


def _value(kind: Any, name: str, text: str) -> Any:
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise RecipeError(
                f"{name} cannot be {text!r:.60}", hint=f"one of {', '.join(get_args(kind))}"
            )
        return text
    if get_origin(kind) is tuple:
        return tuple(_value(get_args(kind)[0], name, each) for each in text.split(",") if each)
    try:
        if kind is bool:
            return _TRUTH[text.lower()]
        value = kind(text)
    except (KeyError, ValueError):
        value = math.nan
    if isinstance(value, float) and not math.isfinite(value):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise RecipeError(f"{name} must be {words[kind]}, not {text!r:.60}")
    return value


def rows(settings: Settings) -> list[tuple[str, str, str]]:
    """Name, value and meaning of every setting, with what it may be; the recipe's own first."""
    shared = {each.name for each in fields(Settings)}
    found = [
        (each.name, _shown(getattr(settings, each.name)), _about(settings, each))
        for each in fields(settings)
    ]
    return [row for row in found if row[0] not in shared] + [r for r in found if r[0] in shared]


def choices(settings: Settings, name: str) -> tuple[str, ...]:
    """The words that the setting ``name`` may be; none where it is a number or a text."""
    kind = get_type_hints(type(settings)).get(name)
    if get_origin(kind) is Literal:
        return get_args(kind)
    return ("yes", "no") if kind is bool else ()


def _about(settings: Settings, one: Field[Any]) -> str:
    about, words = str(one.metadata.get("about", "")), choices(settings, one.name)
    listed = f"{', '.join(words[:-1])} or {words[-1]}" if words and one.type != "bool" else ""
    return f"{about} ({listed})" if listed else about


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """``lr 0.001 -> 0.002, steps 10 -> 20``: where two ``to_dict`` differ; empty where not."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name)} -> {other.get(name)}" for name in names)
