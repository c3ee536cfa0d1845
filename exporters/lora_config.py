"""What an adapter_config.json of PEFT says about ranks and scales, and what it may not say.

Knows the file's keys; never opens weights, and never follows the names of models and code in it.

Keys: https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import SourceError, UnsafeModelError, UnsupportedModelError
from edgekit.formats import json_file
from edgekit.formats.foreign import shown
from edgekit.unsafe_config import refuse_code

CONFIG = "adapter_config.json"

_MAX_BYTES = 1 << 20
_MAX_RANK = 1 << 15
_MAX_PATTERNS = 1024
# Without quantifiers and groups no name makes a pattern slow.
_SAFE_PATTERN = re.compile(r"[\w.\\^$|-]{1,256}")

# Keys that told the training what to do and mean nothing for the matrices that came out of it.
_TRAINING_ONLY = {
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
_READ = {
    "alpha_pattern",
    "auto_mapping",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "use_rslora",
}
# The other ways to start a training change the base weights too, and the folder does not have them.
_HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
MERGE_HINT = "merge it where it was trained (merge_and_unload) and export the merged model"


@dataclass(frozen=True)
class LoraConfig:
    """``transposed`` says that the layers store their weights as [in, out] (GPT-2's Conv1D)."""

    rank: int
    alpha: float
    root_rank: bool
    transposed: bool
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]

    @classmethod
    def read(cls, path: Path) -> LoraConfig:
        """Raises SourceError for bad JSON and bad values, UnsafeModelError for configs that ask for
        code, UnsupportedModelError with the key's name for whatever else would change the output.
        """
        body = json_file.read(path, _MAX_BYTES)
        if not isinstance(body, dict):
            raise SourceError(f"{path} is not a JSON object", hint="download the adapter again")
        _refuse_code(body, path)
        _refuse_unknown(body)
        return cls(
            rank=_rank("r", body.get("r")),
            alpha=_alpha("lora_alpha", body.get("lora_alpha")),
            root_rank=_flag(body, "use_rslora"),
            transposed=_flag(body, "fan_in_fan_out"),
            ranks=tuple(
                (pattern, _rank(key, value))
                for key, pattern, value in _patterns(body, "rank_pattern")
            ),
            alphas=tuple(
                (pattern, _alpha(key, value))
                for key, pattern, value in _patterns(body, "alpha_pattern")
            ),
        )

    def rank_of(self, module: str) -> int:
        """The rank of a module's matrices; the first pattern that matches wins, as in PEFT."""
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        alpha = next((a for pattern, a in self.alphas if pattern.match(module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.root_rank else rank)


def _refuse_code(body: dict[str, Any], path: Path) -> None:
    refuse_code(body, origin=str(path))
    mapping = body.get("auto_mapping")
    if mapping is None:
        return
    # PEFT writes the model's own class here when it was not told a task.
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if not isinstance(library, str) or not re.fullmatch(r"transformers\.models\.[\w.]+", library):
        raise UnsafeModelError(
            f"{path}: auto_mapping names code outside transformers: {shown(str(mapping))}",
            hint="edgekit runs no code of an adapter; remove the key from a copy of the folder",
        )


def _refuse_unknown(body: dict[str, Any]) -> None:
    kind = body.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(
            f"{CONFIG}: peft_type {shown(str(kind))} is not LORA", hint=MERGE_HINT
        )
    refused = {
        key: value
        for key, value in body.items()
        if key not in _TRAINING_ONLY | _READ and value not in (None, False, "", [], {})
    }
    if (bias := body.get("bias")) not in (None, "none"):
        refused["bias"] = bias
    if (start := body.get("init_lora_weights")) not in _HARMLESS_STARTS:
        refused["init_lora_weights"] = start
    if refused:
        key = min(refused)
        raise UnsupportedModelError(
            f"{CONFIG}: {shown(key)} is {shown(str(refused[key]))}, which is no plain LoRA",
            hint=MERGE_HINT,
        )


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key, False)
    if not isinstance(value, bool):
        raise SourceError(f"{CONFIG}: '{key}' must be true or false, not {shown(str(value))}")
    return value


def _rank(key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value <= _MAX_RANK:
        raise SourceError(f"{CONFIG}: {shown(key)} must be a rank above 0, not {shown(str(value))}")
    return value


def _alpha(key: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < 1e9:
        raise SourceError(
            f"{CONFIG}: {shown(key)} must be an alpha above 0, not {shown(str(value))}"
        )
    return float(value)


def _patterns(body: dict[str, Any], key: str) -> list[tuple[str, re.Pattern[str], Any]]:
    """(key, the end of a module's name that it stands for, value) in the file's order."""
    patterns = body.get(key) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise SourceError(f"{CONFIG}: '{key}' must be an object of at most {_MAX_PATTERNS} keys")
    found = []
    for text, value in patterns.items():
        if not _SAFE_PATTERN.fullmatch(text):
            raise UnsupportedModelError(
                f"{CONFIG}: '{key}' has the pattern {shown(text)}, which is more than a name",
                hint="write out the names of the modules that it stands for",
            )
        try:
            found.append((text, re.compile(rf"(.*\.)?({text})$"), value))
        except re.error as error:
            raise SourceError(f"{CONFIG}: '{key}' pattern {shown(text)}: {error}") from None
    return found
