"""Names to classes, loaded only when asked for: exporters, runtimes, built-in models.

Never imports what it names before ``load``; never walks packages to discover anything.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from edgekit.errors import MissingExtraError, UnknownNameError


def did_you_mean(name: str, known: list[str]) -> str:
    """A hint that names the closest known name, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(sorted(known))}"


def load(target: str, *, extra: str) -> Any:
    """Import and return what ``target`` ("module:attribute") names.

    Raises MissingExtraError when a package that it needs is not installed; ``extra`` brings it.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "edgekit"):
            raise
        raise MissingExtraError(extra, missing=missing) from None


class Shelf(Mapping[str, str]):
    """One shelf of the house: name -> ``"module:attribute"``.

    Strangers add rows from a package of their own through the entry-point group of the shelf; a
    built-in row wins over a stranger's row of the same name.
    """

    def __init__(
        self,
        noun: str,
        group: str,
        rows: Mapping[str, str],
        *,
        extra: str,
        extras: Mapping[str, str] | None = None,
    ) -> None:
        """``extras`` names the extra of a row that needs another than ``extra``."""
        self.noun = noun
        self.group = group
        self.extra = extra
        self._extras = dict(extras or {})
        self._rows = dict(rows)

    def _strangers(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def __getitem__(self, name: str) -> str:
        if name in self._rows:
            return self._rows[name]
        return self._strangers()[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._rows, *self._strangers()}))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def check(self, name: str) -> None:
        """Raises UnknownNameError (with a near name as the hint) when no row has that name."""
        if name not in list(self):
            raise UnknownNameError(
                f"no {self.noun} is called '{name}'", hint=did_you_mean(name, list(self))
            )

    def load(self, name: str) -> Any:
        """Import and return what ``name`` stands for.

        Raises UnknownNameError, and MissingExtraError when a package that it needs is missing.
        """
        self.check(name)
        return load(self[name], extra=self._extras.get(name, self.extra))

    def installed(self, name: str) -> bool:
        """Whether ``name`` is there with all that it needs."""
        try:
            self.load(name)
        except (UnknownNameError, MissingExtraError):
            return False
        return True


EXPORTERS = Shelf(
    "export format",
    "edgekit.exporters",
    {
        "gguf": "edgekit.exporters.to_gguf:GgufExporter",
        "onnx": "edgekit.exporters.to_onnx:OnnxExporter",
        "tflite": "edgekit.exporters.to_tflite:TfliteExporter",
    },
    extra="export",
    extras={"tflite": "tflite-convert"},
)

RUNTIMES = Shelf(
    "runtime",
    "edgekit.runtimes",
    {
        "llamacpp": "edgekit.runtimes.llamacpp:LlamaCppRuntime",
        "echo": "edgekit.runtimes.echo:EchoRuntime",
        "ort": "edgekit.runtimes.ort:OrtRuntime",
        "openvino": "edgekit.runtimes.openvino:OpenVinoRuntime",
        "litert": "edgekit.runtimes.litert:LiteRtRuntime",
    },
    extra="llama",
    extras={"ort": "ort", "openvino": "openvino", "litert": "tflite"},
)

# What measures an export of a format against its float model and fills the receipt.
PROOFS = Shelf(
    "proof for a format",
    "edgekit.proofs",
    {
        "gguf": "edgekit.proof:prove",
        "onnx": "edgekit.proof_tensors:prove",
        "tflite": "edgekit.proof_tensors:prove",
    },
    extra="export",
)

# The runtime for an artifact's format, where the user names none.
RUNTIME_OF_FORMAT = {"gguf": "llamacpp", "onnx": "ort", "tflite": "litert"}
# Others that read the format too, and may be faster on some machines.
OTHER_RUNTIMES = {"onnx": ("openvino",)}

# Profiles of boards that strangers bring: a name, and the file (importlib.resources) that holds it.
# The built-in ones are the files of devices/profiles/.
DEVICES = Shelf("device profile", "edgekit.devices", {}, extra="llama")

# One row per `model_type` of a config.json: the file that maps its tensors and metadata to GGUF.
GGUF_FAMILIES = Shelf(
    "model family with a GGUF mapping",
    "edgekit.gguf_families",
    {
        "llama": "edgekit.exporters.arch.llama:Llama",
        "mixtral": "edgekit.exporters.arch.mixtral:Mixtral",
        "phi": "edgekit.exporters.arch.phi:Phi",
        "phi3": "edgekit.exporters.arch.phi3:Phi3",
        "qwen2": "edgekit.exporters.arch.qwen2:Qwen2",
        "qwen3": "edgekit.exporters.arch.qwen3:Qwen3",
        "gemma3": "edgekit.exporters.arch.gemma3:Gemma3",
        "gemma3_text": "edgekit.exporters.arch.gemma3:Gemma3",
        "gpt2": "edgekit.exporters.arch.gpt2:Gpt2",
    },
    extra="export",
)

# What `edgekit train` knows: objects of training/recipe.py, with their settings and functions.
RECIPES = Shelf(
    "training recipe",
    "edgekit.recipes",
    {
        "diffusion": "edgekit.training.diffusion:RECIPE",
        "distill": "edgekit.training.distill:RECIPE",
        "distill-lm": "edgekit.training.distill_lm:RECIPE",
        "dual-encoder": "edgekit.training.dual_encoder:RECIPE",
        "finetune": "edgekit.training.finetune:RECIPE",
        "finetune-vit": "edgekit.training.finetune_vit:RECIPE",
        "minimal": "edgekit.training.minimal:RECIPE",
        "nas": "edgekit.training.nas:RECIPE",
        "prune": "edgekit.training.prune:RECIPE",
        "prune-lm": "edgekit.training.prune_lm:RECIPE",
        "tinyllama": "edgekit.training.tinyllama:RECIPE",
        "video": "edgekit.training.video:RECIPE",
        "vit-qat": "edgekit.training.vit_qat:RECIPE",
    },
    extra="train",
    extras={"finetune": "finetune", "finetune-vit": "finetune"},
)

# Who builds the network of a run's folder (network_folder.py) from its config.
NETWORKS = Shelf(
    "network of a training run",
    "edgekit.networks",
    {
        "diffusion": "edgekit.training.diffusion:build",
        "minimal": "edgekit.training.minimal:build",
        "residual": "edgekit.training.residual:build",
        "video": "edgekit.training.video:build",
        "vit-adapters": "edgekit.training.finetune_vit:build",
        "vit-qat": "edgekit.training.vit_qat:build",
    },
    extra="train",
)
