"""Weights of an ONNX file that lie in another file lie beside it, or nobody opens them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import edgekit
from edgekit.errors import ArtifactError, EdgekitError, SourceError, UnsafePathError
from edgekit.exporters import onnx_graph
from edgekit.formats.onnx import read
from edgekit.preprocess import FILE, ImageSteps, Matching, Preprocessing, TextSteps

SIZE = 4096
# What a location may be called, from inside the folder of the model.
PATHS = [
    "/etc/passwd",
    "../secret",
    "a/../../secret",
    "./../secret",
    "..",
    ".",
    "",
    "/",
    "//etc/passwd",
    "~/secret",
    "C:\\secret",
    "..\\secret",
    "file:///etc/passwd",
    "http://localhost/x",
    "weights\0.bin",
    "weights\n.bin",
    "link",
    "linked/weights.bin",
    "folder",
    "pipe",
    "model.onnx",
    "absent.bin",
    "/dev/zero",
    "/proc/self/environ",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (tmp_path / "secret").write_bytes(b"s" * SIZE)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "weights.bin").write_bytes(b"s" * SIZE)
    (made / "weights.bin").write_bytes(np.zeros(SIZE // 4, np.float32).tobytes())
    (made / "link").symlink_to(tmp_path / "secret")
    (made / "linked").symlink_to(tmp_path / "outside")
    (made / "folder").mkdir()
    os.mkfifo(made / "pipe")
    return made


def _write(folder: Path, location: str, **entries: str) -> Path:
    """A model whose one weight lies in ``location``."""
    weights = numpy_helper.from_array(np.zeros((32, 32), np.float32), "w")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in ({"location": location} | entries).items():
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    values: Any = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 32]) for name in "xy")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [next(values)],
        [next(values)],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_file_beside_the_model_is_read(folder: Path) -> None:
    path = _write(folder, "weights.bin")
    assert read(path).initializers[0].external == "weights.bin"
    with edgekit.load(path, n_threads=1) as session:
        assert not session.run({"x": np.ones((1, 32), np.float32)})["y"].any()


@pytest.mark.parametrize("location", PATHS, ids=[repr(path) for path in PATHS])
def test_no_other_path_is_followed(folder: Path, location: str) -> None:
    """By none of the ways in: the reader, a load, an export, and the graph that is changed."""
    path = _write(folder, location)
    with pytest.raises(ArtifactError):
        read(path)
    with pytest.raises(ArtifactError):
        edgekit.load(path, n_threads=1)
    with pytest.raises(EdgekitError):
        onnx_graph.load(path)
    with pytest.raises(SourceError):
        edgekit.source(path)


@pytest.mark.parametrize("location", PATHS, ids=[repr(path) for path in PATHS])
def test_no_other_path_is_written(folder: Path, location: str) -> None:
    """A model that comes to be saved with its weight elsewhere, wherever in it that weight is."""
    out = folder / "again.onnx"
    for model in _everywhere(onnx.load(str(_write(folder, location)), load_external_data=False)):
        with pytest.raises(UnsafePathError, match="'w'"):
            onnx_graph.save(model, out)
        assert not out.exists()


def _everywhere(model: Any) -> Iterator[Any]:
    """The model, and others with its weight in the places where one is easily overlooked."""
    (hidden,) = model.graph.initializer
    yield model
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.initializer[:]
    inner = helper.make_graph([], "inner", [], [], [hidden])
    for attribute in (
        helper.make_attribute("value", hidden),
        helper.make_attribute("values", [hidden]),
        helper.make_attribute("body", inner),
    ):
        made = onnx.ModelProto()
        made.CopyFrom(bare)
        made.graph.node[0].attribute.append(attribute)
        yield made
    places = [onnx.ModelProto() for _ in range(4)]
    for made in places:
        made.CopyFrom(bare)
    places[0].graph.sparse_initializer.add().values.CopyFrom(hidden)
    places[1].training_info.add().algorithm.initializer.append(hidden)
    function = places[2].functions.add(name="f", domain="own")
    function.attribute_proto.append(helper.make_attribute("value", hidden))
    # Said to be inside, with a place outside all the same.
    made = places[3].graph.initializer.add()
    made.CopyFrom(hidden)
    made.raw_data, made.data_location = bytes(SIZE), TensorProto.DEFAULT
    yield from places


def test_a_model_is_saved_with_the_weights_that_lie_beside_it(folder: Path) -> None:
    """By the one name that such a file has, and if nobody put a link there."""
    path = _write(folder, "again.onnx.data")
    model = onnx.load(str(path), load_external_data=False)
    (folder / "weights.bin").rename(folder / "again.onnx.data")
    onnx_graph.save(model, folder / "again.onnx")
    assert read(folder / "again.onnx").beside == ["again.onnx.data"]
    (folder / "again.onnx").unlink()
    (folder / "again.onnx.data").unlink()
    (folder / "again.onnx.data").symlink_to(folder.parent / "secret")
    with pytest.raises(UnsafePathError):
        onnx_graph.save(model, folder / "again.onnx")
    twice = model.graph.initializer[0].external_data.add()
    twice.key, twice.value = "location", "../secret"
    with pytest.raises(UnsafePathError):
        onnx_graph.save(model, folder / "again.onnx")
    assert not (folder / "again.onnx").exists()


def test_a_weight_hidden_in_a_function_or_a_training_graph_is_found(folder: Path) -> None:
    path = _write(folder, "../secret")
    hidden = onnx.load(str(path), load_external_data=False).graph.initializer[0]
    _write(folder, "weights.bin")
    sound = onnx.load(str(path), load_external_data=False)
    function, training = onnx.ModelProto(), onnx.ModelProto()
    function.CopyFrom(sound)
    made = function.functions.add(name="f", domain="own")
    made.attribute_proto.append(helper.make_attribute("value", hidden))
    training.CopyFrom(sound)
    training.training_info.add().algorithm.initializer.append(hidden)
    for model in (function, training):
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ArtifactError):
            read(path)


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "-1"},
        {"offset": "4096"},
        {"offset": "1e3"},
        {"offset": "9" * 30},
        {"length": "8192"},
        {"length": "-4096"},
        {"length": "0"},
        {"offset": "٣"},
    ],
)
def test_a_place_outside_of_the_file_is_refused(folder: Path, entries: dict[str, str]) -> None:
    with pytest.raises(ArtifactError):
        read(_write(folder, "weights.bin", **entries))


def test_a_saved_model_brings_its_weights_along(folder: Path, tmp_path: Path) -> None:
    path = _write(folder, "weights.bin")
    onnx_graph.save(onnx_graph.load(path), tmp_path / "one.onnx")
    assert read(tmp_path / "one.onnx").initializers[0].external is None
    assert onnx.load(str(tmp_path / "one.onnx")).graph.initializer[0].raw_data


# What the encoder of texts may be called, from inside the folder of that of the images. That one
# itself is the wrong encoder, and no other path.
TEXT_MODELS = [
    *(path for path in PATHS if path != "model.onnx"),
    "../outside/text.onnx",
    "a/../../outside/text.onnx",
    "./text.onnx",
    "linked/text.onnx",
    "inside/text.onnx",
    "link.onnx",
    "folder.onnx",
    "pipe.onnx",
    "absent.onnx",
    ".onnx",
    "..\\outside\\text.onnx",
    "C:text.onnx",
    "file:///text.onnx",
    "text\0.onnx",
    "text\n.onnx",
    "text.onnx\0",
]


def _graph(path: Path, given: dict[str, tuple[int, list[Any]]], node: Any) -> None:
    """A model of one node that makes ``y``."""
    inputs = [helper.make_tensor_value_info(name, *what) for name, what in given.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def _two_encoders(folder: Path, text_model: str) -> Path:
    """A model of two encoders whose second one is ``text_model``; a sound one lies in every place
    where a name could lead.
    """
    pixels = {"x": (TensorProto.FLOAT, ["batch", 3, 8, 8])}
    _graph(folder / "model.onnx", pixels, helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3]))
    text = folder.parent / "outside" / "text.onnx"
    ids = {"input_ids": (TensorProto.INT64, ["batch", "length"])}
    _graph(text, ids, helper.make_node("Cast", ["input_ids"], ["y"], to=TensorProto.FLOAT))
    (folder / "inside").mkdir()
    (folder / "folder.onnx").mkdir()
    os.mkfifo(folder / "pipe.onnx")
    (folder / "link.onnx").symlink_to(text)
    for place in (folder, folder / "inside"):
        (place / "text.onnx").write_bytes(text.read_bytes())
    Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
        str(folder / "tokenizer.json")
    )
    steps = Preprocessing(
        "image-text",
        image=ImageSteps("x", 8, 8, None, 8, 8, False, "bilinear", 1 / 255, (0.0,) * 3, (1.0,) * 3),
        text=TextSteps("tokenizer.json", 8, "cls", normalize=True, pad_id=0, padded=True),
        matching=Matching(text_model, 1.0, 0.0, alone=False),
    )
    (folder / FILE).write_bytes(steps.to_bytes())
    return folder / "model.onnx"


def test_an_encoder_of_texts_beside_that_of_the_images_is_loaded(folder: Path) -> None:
    with edgekit.load(_two_encoders(folder, "text.onnx"), n_threads=1) as session:
        assert session.embed("a") is not None


@pytest.mark.parametrize("name", TEXT_MODELS, ids=[repr(name) for name in TEXT_MODELS])
def test_no_encoder_of_texts_comes_from_elsewhere(folder: Path, name: str) -> None:
    path = _two_encoders(folder, name)
    with pytest.raises(EdgekitError) as error:
        edgekit.load(path, n_threads=1)
    assert error.value.message.isprintable()
    assert isinstance(error.value, ArtifactError | SourceError)
