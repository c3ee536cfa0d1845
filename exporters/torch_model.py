"""A source as a float32 torch module that can be traced: which class, which inputs, which outputs.

Knows transformers and the user's own modules; never ONNX, and never a weight outside safetensors.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgekit import image_processor, network_folder
from edgekit.errors import (
    EdgekitError,
    ExportError,
    MissingExtraError,
    SourceError,
    UnsupportedModelError,
)
from edgekit.exporters.silence import silenced
from edgekit.formats import json_file
from edgekit.formats.foreign import shown
from edgekit.preprocess import Preprocessing, of_folder, of_image
from edgekit.registry import NETWORKS, did_you_mean
from edgekit.source import ModelSource, TorchModule

# model_type of config.json -> what such a model reads.
VISION = (
    *("vit", "deit", "beit", "dinov2", "swin", "convnext", "resnet", "regnet"),
    *("mobilenet_v1", "mobilenet_v2", "mobilevit", "efficientnet"),
)
BOTH = ("clip", "siglip")  # two encoders: torch_towers
TEXT = ("bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "electra", "albert")
_LENGTH = 16  # tokens of the text that a model is traced with


@dataclass(frozen=True)
class TracedModel:
    """What a tracer needs.

    ``module`` takes ``example_inputs`` in the order of ``inputs`` and returns a tensor, or a tuple
    of them in the order of ``outputs``. ``dynamic`` names the axes of an input or output that may
    have any size.
    """

    module: Any
    example_inputs: tuple[Any, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]
    preprocessing: Preprocessing


def build(source: ModelSource) -> TracedModel:
    """Load the weights of ``source`` as float32, ready to be traced.

    Raises MissingExtraError without torch or transformers, UnsupportedModelError for a family that
    is not known, ExportError when the library or the user's own code fails.
    """
    torch = load_torch()
    if source.kind == "hf":
        return _of_folder(torch, source)
    return _of_module(torch, own_module(source))


def check(source: ModelSource) -> None:
    """Whether ``build`` knows this kind of model, without loading it. Raises as ``build``."""
    if source.kind == "gguf":
        raise UnsupportedModelError(
            "a GGUF file holds a language model, which goes to GGUF and ONNX alone",
            hint="--format gguf, or --format onnx",
        )
    if source.kind == "hf" and source.family not in (*VISION, *TEXT, *BOTH):
        raise UnsupportedModelError(
            f"edgekit traces no '{shown(source.family)}'",
            hint="language models: --format gguf, or onnx; others: "
            + did_you_mean(source.family, [*VISION, *TEXT, *BOTH]),
        )


def is_convolutional(source: ModelSource) -> bool:
    """Whether most of its work are convolutions: what decides the fast way to 8 bits."""
    if source.kind == "hf":
        return source.family in (
            *("convnext", "resnet", "regnet", "efficientnet"),
            *("mobilenet_v1", "mobilenet_v2", "mobilevit"),
        )
    kinds = [type(layer).__name__ for layer in own_module(source).module.modules()]
    return sum("Conv" in kind for kind in kinds) > sum("Linear" in kind for kind in kinds)


def load_torch() -> Any:
    """The package torch. Raises MissingExtraError."""
    try:
        import torch
    except ImportError:
        raise MissingExtraError("onnx", missing="torch") from None
    return torch


# A Hugging Face folder


def _of_folder(torch: Any, source: ModelSource) -> TracedModel:
    beside = companions(source)
    preprocessing = of_folder(source.config, **beside)
    classes = {
        "image-classification": "AutoModelForImageClassification",
        "text-classification": "AutoModelForSequenceClassification",
    }
    model = loaded(source, classes.get(preprocessing.task, "AutoModel"))
    output = "logits" if preprocessing.task.endswith("classification") else "last_hidden_state"
    if preprocessing.image:
        image = preprocessing.image
        if image_processor.flips_channels(beside["preprocessor"] or {}):
            _take_red_first(torch, model)
        _pool_whole_maps(torch, model, max(image.height, image.width))
        example = torch.zeros(1, len(image.mean), image.height, image.width)
        examples: tuple[Any, ...] = (example,)
        inputs: tuple[str, ...] = (image.input,)
        dynamic = {image.input: {0: "batch"}, output: {0: "batch"}}
    else:
        inputs = names = _text_inputs(model)
        given = _text_example(torch, int(source.config.get("vocab_size", _LENGTH)))
        examples = tuple(given[name] for name in names)
        axes = {0: "batch", 1: "sequence"}
        whole = preprocessing.task == "text-classification"
        dynamic = {name: axes for name in names} | {output: {0: "batch"} if whole else axes}
    return TracedModel(
        _named_output(torch, model, inputs, output),
        examples,
        inputs,
        (output,),
        dynamic,
        preprocessing,
    )


def _take_red_first(torch: Any, model: Any) -> None:
    """Turn the weights that see the pixels, so that no run has to turn the pixels."""
    first = next(layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))
    with torch.no_grad():
        first.weight.copy_(first.weight.flip(1))


def _pool_whole_maps(torch: Any, model: Any, side: int) -> None:
    """EfficientNet takes the mean of a map by windows larger than any map, rounded up to one. Int8
    kernels divide such a sum by the size of the window: what comes out is next to nothing.
    """
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, torch.nn.AvgPool2d) and layer.ceil_mode:
                size = layer.kernel_size
                if min(size if isinstance(size, tuple) else (size,)) >= side:
                    setattr(module, name, torch.nn.AdaptiveAvgPool2d(1))


def loaded(source: ModelSource, kind: str) -> Any:
    """The folder's model as the class ``kind`` of transformers, float32, with eager attention.

    Raises MissingExtraError, UnsupportedModelError, SourceError for weights that are missing,
    ExportError when the library fails.
    """
    check(source)
    torch = load_torch()
    try:
        with silenced():  # it looks for a dozen other libraries, some of which complain aloud
            import transformers
    except ImportError:
        raise MissingExtraError("onnx", missing="transformers") from None
    with _quiet(), _failing(f"transformers cannot load {source.spec}"):
        model, report = getattr(transformers, kind).from_pretrained(
            source.path,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # What is traced from the other implementations is slower in every runtime.
            attn_implementation="eager",
            dtype=torch.float32,
        )
    _check_whole(source, report)
    return model.eval()


def companions(source: ModelSource) -> dict[str, Any]:
    """The folder's JSON files that say how inputs are made, as ``preprocess.of_folder`` takes them;
    None for those that it does not have.
    """
    return {
        name: json_file.read(source.file_path(file)) if file in source.files else None
        for name, file in _COMPANIONS.items()
    }


def _check_whole(source: ModelSource, report: Mapping[str, Any]) -> None:
    """The library fills weights that are missing or misshapen with random ones, and only warns."""
    # The pooler is no part of what is exported.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    misshapen = sorted(str(each[0]) for each in report["mismatched_keys"])
    for what, names in (("no weights for", missing), ("weights of another shape for", misshapen)):
        if names:
            raise SourceError(
                f"{source.spec} has {what} {shown(names[0])} and {len(names) - 1} more",
                hint="the folder is incomplete, or its config.json belongs to another model",
            )


_COMPANIONS = {
    "preprocessor": "preprocessor_config.json",
    "pooling": "1_Pooling/config.json",
    "modules": "modules.json",
    "tokenizer": "tokenizer_config.json",
}


def _text_inputs(model: Any) -> tuple[str, ...]:
    """Those of the three that the model's forward takes."""
    known = inspect.signature(model.forward).parameters
    return tuple(n for n in ("input_ids", "attention_mask", "token_type_ids") if n in known)


def _text_example(torch: Any, n_vocab: int) -> dict[str, Any]:
    """Two texts of different tokens, of which one is shorter and padded: what a mask is for."""
    ids = torch.arange(2 * _LENGTH).reshape(2, _LENGTH) % n_vocab
    mask = torch.ones_like(ids)
    mask[1, _LENGTH // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def _named_output(torch: Any, model: Any, inputs: tuple[str, ...], output: str) -> Any:
    """A module of positional inputs that returns one tensor."""

    class Traced(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            named = dict(zip(inputs, tensors, strict=True))
            return getattr(self.model(**named, return_dict=True), output)

    return Traced().eval()


# A module of the user's own


def own_module(source: ModelSource) -> TorchModule:
    """The module in memory, that of a training run, or what the user's own function returns; that
    runs each time.
    """
    return source.module or (_of_run(source) if source.kind == "run" else _of_function(source))


def _of_run(source: ModelSource) -> TorchModule:
    """The network that edgekit's own builder makes of the folder's config, with its weights."""
    torch = load_torch()
    from safetensors.torch import load_file

    found = network_folder.read(source.path)
    build = NETWORKS.load(found.network)
    with _failing(f"{source.spec} cannot be built"):
        # Sizes first, without memory: a config may ask for anything.
        with torch.device("meta"):
            shapes = {n: tuple(t.shape) for n, t in build(found.config).state_dict().items()}
        network_folder.check_weights(source.path, shapes)
        module = build(found.config)
        module.load_state_dict(load_file(source.path / network_folder.WEIGHTS))
    return TorchModule(module.eval(), (torch.zeros(found.input_shape),), found.preprocess)


def _of_function(source: ModelSource) -> TorchModule:
    assert source.function is not None
    # Under a name of its own, so that no import of the user's finds it by accident.
    spec = importlib.util.spec_from_file_location("edgekit_user_model", source.path)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(source.path.parent))
    try:
        with _failing(f"{source.spec} failed"):
            spec.loader.exec_module(program)
            function = getattr(program, source.function, None)
            if not callable(function):
                raise ExportError(f"{source.path.name} has no function {source.function}")
            found = function()
    finally:
        sys.path.remove(str(source.path.parent))
    match found:
        case (module, inputs) if callable(getattr(module, "state_dict", None)):
            return TorchModule(module, inputs)
        case (module, inputs, dict() as given) if callable(getattr(module, "state_dict", None)):
            return TorchModule(module, inputs, given)
    raise ExportError(
        f"{source.spec} must return a torch module and its example inputs, and may return a dict"
        " that says how images become those"
    )


def _of_module(torch: Any, own: TorchModule) -> TracedModel:
    module = copy.deepcopy(own.module).eval()  # the user goes on training theirs
    given = own.example_inputs
    if isinstance(given, Mapping):
        inputs, examples = tuple(map(str, given)), tuple(given.values())
    else:
        examples = (given,) if isinstance(given, torch.Tensor) else tuple(given)
        parameters = list(inspect.signature(module.forward).parameters)
        inputs = tuple(parameters[: len(examples)])
    if not examples or not all(isinstance(each, torch.Tensor) for each in examples):
        raise ExportError("example inputs must be tensors")
    if len(inputs) != len(examples):
        raise ExportError(f"the module takes {len(inputs)} inputs, {len(examples)} are given")
    with torch.no_grad(), _failing("the module fails on its example inputs"):
        found = module(**dict(zip(inputs, examples, strict=True)))
    names = _output_names(torch, found)
    dynamic = {
        name: {0: "batch"}
        for name, tensor in zip((*inputs, *names), (*examples, *_tensors(found)), strict=True)
        if tensor.dim() and tensor.shape[0] == examples[0].shape[0]
    }
    return TracedModel(
        _tuple_output(torch, module, inputs),
        examples,
        inputs,
        names,
        dynamic,
        _steps(own, inputs, examples),
    )


def _steps(own: TorchModule, inputs: tuple[str, ...], examples: tuple[Any, ...]) -> Preprocessing:
    """What makes the inputs of a module of the user's own."""
    if own.preprocess is None:
        return Preprocessing(task="tensors")
    if len(inputs) != 1:
        raise ExportError("preprocess is for a module that takes one image, and nothing else")
    return of_image(own.preprocess, inputs[0], tuple(examples[0].shape))


def _output_names(torch: Any, found: Any) -> tuple[str, ...]:
    if isinstance(found, Mapping):
        return tuple(map(str, found))
    if isinstance(found, torch.Tensor):
        return ("output",)
    return tuple(f"output_{i}" for i in range(len(_tensors(found))))


def _tensors(found: Any) -> tuple[Any, ...]:
    """The tensors that a forward returned, in order."""
    if isinstance(found, Mapping):
        return tuple(found.values())
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _tuple_output(torch: Any, module: Any, inputs: tuple[str, ...]) -> Any:
    class Traced(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: Any) -> Any:
            return _tensors(self.module(**dict(zip(inputs, tensors, strict=True))))

    return Traced().eval()


# What foreign code may do meanwhile


@contextlib.contextmanager
def _failing(what: str) -> Iterator[None]:
    """Whatever a library or the user's code raises becomes one ExportError."""
    try:
        yield
    except EdgekitError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"{what}: {reason[0][:200]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no advice of the library on stderr."""
    from transformers.utils import logging as library

    level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.ERROR)
    library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
