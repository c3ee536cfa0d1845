"""A TFLite file is planned from its header, as an ONNX file of the same model is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_tflite
import torch
from conftest import Ran
from tiny_convnet import SIDE, Net, as_tflite

from edgekit.errors import SourceError, UsageError
from edgekit.exporter import export
from edgekit.plan import plan
from edgekit.planned_model import planned


def test_both_formats_of_a_net_cost_the_same_and_have_engines_of_their_own(tmp_path: Path) -> None:
    net = Net().eval()
    lite = tiny_tflite.artifact(tmp_path / "lite", as_tflite(net))
    example = (torch.zeros(1, 3, SIDE, SIDE),)
    onnx = export(
        net, "onnx", example_inputs=example, bits=32, receipt=False, out=tmp_path / "onnx"
    )
    costs = [planned(path).vision for path in (lite, onnx.path)]
    assert costs[0] is not None and costs[1] is not None
    assert costs[0].flops == pytest.approx(costs[1].flops, rel=0.05)
    mine, theirs = plan(lite, "rpi5"), plan(onnx.path, "rpi5")
    assert mine.fits and mine.type == "F32" and mine.latency_ms and theirs.latency_ms
    assert mine.memory.weights == pytest.approx(theirs.memory.weights, rel=0.1)
    assert mine.latency_ms.mid < theirs.latency_ms.mid
    assert any("tflite against ncnn" in each.name for each in mine.inputs)


def test_what_8_bits_would_bring_and_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "net.tflite"
    path.write_bytes(as_tflite(Net().eval()))
    plain, narrow = plan(path, "rpi5"), plan(path, "rpi5", bits=8)
    assert narrow.type == "int8" and narrow.memory.weights < plain.memory.weights / 3
    with pytest.raises(UsageError, match="--bits 8 or --bits 32"):
        plan(path, "rpi5", bits=4)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(SourceError):
        plan(path, "rpi5")


def test_the_command_line_plans_a_tflite_file(cli: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "net.tflite").write_bytes(as_tflite(Net().eval()))
    done = cli("plan", "net.tflite", "--device", "rpi5", "--json")
    assert done.code == 0, done.stderr
    body = json.loads(done.stdout)
    assert body["fits"] and body["latency_ms"]["mid"] > 0 and body["bound"] in ("memory", "compute")
