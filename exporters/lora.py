"""A PEFT LoRA folder: merged into a model's weights, or written as an adapter for llama.cpp.

Knows what adapter_config.json promises and which matrices belong to which weight; must never
follow the base model that the folder names, guess at what it does not know, or open a pickle.

LoRA: W + scale * B A, scale = alpha / r (https://arxiv.org/abs/2106.09685, section 4.1) or
alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from edgekit import _fs
from edgekit.errors import SourceError, UnsupportedModelError
from edgekit.exporters import hf_weights
from edgekit.exporters.arch.family import Array, Family, Placement, family_of
from edgekit.exporters.hf_weights import Weight
from edgekit.exporters.lora_config import CONFIG, MERGE_HINT, LoraConfig
from edgekit.formats import safetensors
from edgekit.formats.foreign import shown
from edgekit.model_folder import as_source, refuse_pickles, safe_path
from edgekit.source import ModelSource

WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_MATRIX = re.compile(re.escape(_PREFIX) + r"(.{1,256})\.lora_([AB])\.weight")
# PEFT saves whole embeddings and heads along with the matrices where it thinks they may differ.
_COPY = re.compile(
    re.escape(_PREFIX) + r"(.*(?:embed_tokens|lm_head|wte))(?:\.base_layer)?\.weight"
)
_OTHER_KINDS = {
    "lora_embedding_": "a LoRA of an embedding",
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_B.bias": "a LoRA with a bias",
}
# Models with and without their head differ in these first parts of a name, and in nothing else.
_WRAPPERS = ("model", "transformer", "language_model")
_WRONG_MODEL = "give the adapter together with the model that it was trained on"


@dataclass(frozen=True)
class _Pair:
    """What changes one weight: A is [rank, in], B is [out, rank]; ``alpha`` is scale times rank."""

    module: str
    a: Weight
    b: Weight
    alpha: float
    transposed: bool

    @property
    def rank(self) -> int:
        return self.a.rows

    @property
    def target_shape(self) -> tuple[int, int]:
        """The shape of the weight: [out, in], or [in, out] where the layer stores it transposed."""
        out, inner = self.b.rows, self.a.row_elements
        return (inner, out) if self.transposed else (out, inner)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """SourceError unless this changes a weight of ``shape``."""
        if shape != self.target_shape:
            raise SourceError(
                f"the adapter changes '{self.module}' as a {list(self.target_shape)} matrix, but"
                f" the model's is {list(shape)}",
                hint=_WRONG_MODEL,
            )

    def merged(self, weight: Array) -> Array:
        """``weight`` with the change added, float32."""
        self.check_shape(weight.shape)
        change: Array = _values(self.b) @ _values(self.a)
        change *= np.float32(self.alpha / self.rank)
        if self.transposed:
            change = change.T
        change += weight
        return change


@dataclass(frozen=True)
class Adapter:
    """An opened LoRA folder. ``sha256`` is one hash over its config and its weights."""

    sha256: str
    alpha: float
    _pairs: Mapping[str, _Pair]
    _copies: tuple[tuple[str, Weight], ...]

    def patch(self, name: str, weight: Array) -> Array:
        """The merged weight of the source's tensor ``name``, float32 of the same shape.

        The same object comes back where the adapter changes nothing. Raises SourceError for another
        shape, and for values that are not finite.
        """
        pair = self._pairs.get(_core(name))
        return weight if pair is None else pair.merged(weight)

    def check(self, source: ModelSource) -> None:
        """Raise SourceError unless every matrix of the adapter changes a tensor of the model.

        Reads headers alone (and embeddings that the adapter has a copy of), so that an export can
        be refused before it starts. Raises UnsupportedModelError where such a copy differs.
        """
        for _ in self._targets(source, family_of(source)):
            pass

    def _targets(self, source: ModelSource, family: Family) -> Iterator[tuple[_Pair, Placement]]:
        """Each change with the place of its weight in a GGUF file."""
        weights = {_core(name): weight for name, weight in hf_weights.find(source).items()}
        wanted = [*self._pairs, *(core for core, _ in self._copies)]
        if unused := [core for core in wanted if core not in weights]:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            raise SourceError(
                f"the adapter changes {shown(unused[0])}{more}, which the model does not have",
                hint=_WRONG_MODEL,
            )
        for core, copy in self._copies:
            if _fingerprint(copy) != _fingerprint(weights[core]):
                raise UnsupportedModelError(
                    f"the adapter brings a '{core}' of its own, which differs from the model's",
                    hint=MERGE_HINT,
                )
        for core, pair in self._pairs.items():
            weight = weights[core]
            placement = family.place(weight.name, weight.shape)
            if placement is None:
                raise SourceError(f"the adapter changes '{pair.module}', which GGUF does not keep")
            if placement.stack:
                raise UnsupportedModelError(
                    f"the adapter changes '{pair.module}', one of several experts", hint=MERGE_HINT
                )
            if pair.transposed != (placement.shape is not None):
                raise SourceError(
                    f"{CONFIG} says fan_in_fan_out={str(pair.transposed).lower()}, but the model"
                    f" stores '{weight.name}' the other way",
                    hint=_WRONG_MODEL,
                )
            pair.check_shape(weight.shape)
            yield pair, placement


def open_adapter(folder: Path) -> Adapter:
    """Check a PEFT folder and find its matrices; no weight is read yet.

    Raises UnsafeModelError for pickled weights, links and configs that ask for code;
    UnsupportedModelError for every kind of adapter that is not a plain LoRA of linear layers, by
    the name of what is in the way; SourceError for what is missing, malformed or contradictory.
    """
    if not folder.is_dir():
        raise SourceError(f"{folder} is no folder", hint="give the folder that PEFT saved")
    config_path, weights_path = _file(folder, CONFIG), _file(folder, WEIGHTS)
    config = LoraConfig.read(config_path)
    digest = hashlib.sha256()
    for path in (config_path, weights_path):
        digest.update(bytes.fromhex(_fs.sha256_file(path)))
    pairs, copies = _contents(config, weights_path)
    return Adapter(digest.hexdigest(), config.alpha, pairs, tuple(copies))


def write_gguf(adapter: Adapter, source: ModelSource, out: Path) -> None:
    """Write the adapter for llama.cpp, float32; the same folder gives the same bytes.

    ``source`` gives the family: names, and the order in which llama.cpp keeps rows. llama.cpp knows
    one alpha a file and divides it by each rank, so whatever else scales a matrix goes into its B.
    Raises what ``Adapter.check`` raises.
    """
    family = family_of(source)
    targets = sorted(adapter._targets(source, family), key=lambda target: target[1].name)
    writer = gguf.GGUFWriter(path=out, arch=family.architecture)
    with _fs.disk_errors(out):
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
            for pair, placement in targets:
                for suffix, weight in (("lora_a", pair.a), ("lora_b", pair.b)):
                    size_bytes = 4 * weight.rows * weight.row_elements
                    name = f"{placement.name}.{suffix}"
                    writer.add_tensor_info(name, weight.shape, np.dtype(np.float32), size_bytes)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for pair, placement in targets:
                scaled = _values(pair.b) * np.float32(pair.alpha / adapter.alpha)
                writer.write_tensor_data(_values(pair.a))
                writer.write_tensor_data(scaled[_row_order(pair, placement)])
        finally:
            writer.close()


def _file(folder: Path, name: str) -> Path:
    """A file of the folder that is safe to open."""
    path = safe_path(folder, name)
    if path.is_file():
        return path
    refuse_pickles(str(folder), [other.name for other in folder.iterdir()])
    raise SourceError(f"{folder} has no {name}", hint="give the folder that PEFT saved")


def _core(name: str) -> str:
    """A tensor's or module's name without what wraps the model."""
    parts = name.removesuffix(".weight").split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(parts)


def _contents(config: LoraConfig, path: Path) -> tuple[dict[str, _Pair], list[tuple[str, Weight]]]:
    """The changes and the copies in the file, by the names that ``_core`` gives."""
    with as_source(path):
        tensors = safetensors.read(path).tensors
    found: dict[str, dict[str, Weight]] = {}
    copies: list[tuple[str, Weight]] = []
    for name, tensor in tensors.items():
        matrix, copy = _MATRIX.fullmatch(name), _COPY.fullmatch(name)
        if not (matrix or copy):
            raise _stranger(name)
        if tensor.dtype not in ("F32", "F16", "BF16") or len(tensor.shape) != 2:
            raise UnsupportedModelError(
                f"the adapter's '{name}' is {tensor.dtype} {list(tensor.shape)}, not a matrix of"
                " F32, F16 or BF16"
            )
        weight = Weight(name, path, tensor.dtype, tensor.shape, tensor.offset)
        if matrix:
            found.setdefault(matrix[1], {})[matrix[2]] = weight
        elif copy:
            copies.append((_core(copy[1]), weight))
    if not found:
        raise SourceError(f"{path} holds no LoRA matrices")
    pairs: dict[str, _Pair] = {}
    for module, matrices in sorted(found.items()):
        core = _core(module)
        if core in pairs:
            raise SourceError(f"the adapter changes '{core}' twice")
        pairs[core] = _pair(config, module, matrices)
    return pairs, copies


def _stranger(name: str) -> UnsupportedModelError:
    what = [kind for part, kind in _OTHER_KINDS.items() if part in name]
    return UnsupportedModelError(
        f"the adapter's {shown(name.removeprefix(_PREFIX))} is"
        f" {what[0] if what else 'no LoRA matrix'}",
        hint="edgekit takes adapters that change linear layers by A and B alone",
    )


def _pair(config: LoraConfig, module: str, matrices: dict[str, Weight]) -> _Pair:
    if len(matrices) != 2:
        raise SourceError(
            f"the adapter has only lora_{next(iter(matrices))} of '{module}'",
            hint="download the adapter again",
        )
    a, b, rank = matrices["A"], matrices["B"], config.rank_of(module)
    if (a.rows, b.row_elements) != (rank, rank) or 0 in a.shape + b.shape:
        raise SourceError(
            f"'{module}' has A {list(a.shape)} and B {list(b.shape)}, which is not the rank {rank}"
            f" of {CONFIG}"
        )
    return _Pair(module, a, b, config.scale_of(module) * rank, config.transposed)


def _values(weight: Weight) -> Array:
    """A whole matrix of the adapter, float32."""
    values = hf_weights.to_float32(next(hf_weights.blocks(weight, 0)), weight.dtype)
    if not np.isfinite(values).all():
        raise SourceError(f"the adapter's '{weight.name}' holds values that are not finite")
    return values


def _fingerprint(weight: Weight) -> bytes:
    """Equal for tensors of equal values, whatever float type holds them."""
    digest = hashlib.sha256(repr(weight.shape).encode())
    for block in hf_weights.blocks(weight):
        digest.update(hf_weights.to_float32(block, weight.dtype).tobytes())
    return digest.digest()


def _row_order(pair: _Pair, placement: Placement) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """Which row of B comes where: the order in which the family keeps the rows of the weight."""
    rows = np.arange(pair.b.rows, dtype=np.intp)
    # A transposed layer is turned round for GGUF, which puts B's rows where they are.
    if placement.change is None or pair.transposed:
        return rows
    order = placement.change(rows.astype(np.float32)[:, None])[:, 0].astype(np.intp)
    if not np.array_equal(np.sort(order), rows):
        raise UnsupportedModelError(
            f"an adapter of '{pair.module}' cannot be kept beside the model",
            hint="merge it: leave --keep-adapter away",
        )
    return order
