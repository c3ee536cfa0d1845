"""Weights of an ONNX file that lie in another file lie beside it, or nobody opens them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgekit
from edgekit.errors import ArtifactError, EdgekitError, SourceError
from edgekit.exporters import onnx_graph
from edgekit.formats.onnx import read

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
    """By none of the ways in: the reader, a load, an export, and the graph that is saved again."""
    path = _write(folder, location)
    with pytest.raises(ArtifactError):
        read(path)
    with pytest.raises(ArtifactError):
        edgekit.load(path, n_threads=1)
    with pytest.raises(EdgekitError):
        onnx_graph.save(onnx_graph.load(path), folder / "again.onnx")
    with pytest.raises(SourceError):
        edgekit.source(path)
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
