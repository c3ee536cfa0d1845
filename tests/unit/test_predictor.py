"""A prediction moves with what decides it, and says how each of its figures is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import planned_gguf
import profiles as sample
import pytest

from edgekit import _yaml, device, machine, model_cost
from edgekit.device import DeviceProfile, Figure, load_profile
from edgekit.measured_profile import measured_profile
from edgekit.model_cost import ModelCost
from edgekit.predictor import CALIBRATION, Work, impossible, operator_s, predict
from edgekit.probe import KernelLimit, Limit, Limits, OperatorLimit
from edgekit.tensor_types import retyped

LARGE = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256}


def cost(kind: str = "Q4_K_M", **changes: Any) -> ModelCost:
    return model_cost.cost(retyped(planned_gguf.header(**LARGE | changes), kind))


def tiny(**changes: Any) -> DeviceProfile:
    return device.parse(_yaml.dump(sample.body() | changes), origin="tiny.yaml")


def _decode(profile: DeviceProfile, work: Work | None = None, kind: str = "Q4_K_M") -> float:
    return predict(cost(kind), profile, work).decode.mid


def test_a_large_model_on_a_board_is_bound_by_its_memory() -> None:
    found = predict(cost(), load_profile("rpi5"))
    read = cost().weight_bytes_per_token
    roof = 11.59e9 * CALIBRATION.memory / read
    assert found.bound == "memory"
    assert 0.8 * roof < found.decode.mid < roof


def test_more_bandwidth_fewer_bits_and_a_shorter_context_are_faster() -> None:
    board = load_profile("rpi5")
    assert _decode(board) > 1.5 * _decode(load_profile("rpi4"))
    assert _decode(board) > 1.5 * _decode(board, kind="Q8_0")
    assert _decode(board) > _decode(board, Work(depth=8192))
    assert _decode(board, Work(depth=8192, kv_type="q8_0")) > _decode(board, Work(depth=8192))
    assert _decode(board, Work(n_seqs=4)) > _decode(board)
    assert predict(cost(), board).prefill.mid > _decode(board)


def test_a_gpu_takes_its_part_of_the_time_away() -> None:
    board = load_profile("gpu-4gb")
    none, half, whole = (_decode(board, Work(gpu_part=part)) for part in (0.0, 0.5, 1.0))
    assert none < half < whole
    assert 1 / half == pytest.approx((1 / none + 1 / whole) / 2)


def test_the_band_is_as_wide_as_the_weakest_source() -> None:
    def spread(source: str) -> float:
        rows = [sample.at(1, 1.0) | {"source": source}]
        memory = sample.body()["memory"] | {"read_gbps": rows}
        found = predict(cost(), tiny(memory=memory)).decode
        assert found.low < found.mid < found.high
        return found.high / found.mid

    assert spread("measured") < spread("published") < spread("assumed")


def test_every_input_says_how_it_is_known() -> None:
    inputs = predict(cost(), load_profile("gpu-4gb"), Work(gpu_part=0.5)).inputs
    assert {"measured", "published", "assumed"} >= {each.source for each in inputs}
    assert all(each.origin and each.value > 0 for each in inputs)
    names = " ".join(each.name for each in inputs)
    assert "read bandwidth" in names and "GPU bandwidth" in names


def test_a_speed_beyond_the_memory_is_impossible_and_one_below_is_not() -> None:
    board = load_profile("rpi5")
    most = 17.1e9 / cost().weight_bytes_per_token
    assert impossible(0.99 * most, cost(), board) is None
    assert "17.1" in (impossible(1.01 * most, cost(), board) or "")


def test_a_model_that_lies_in_the_caches_can_beat_the_memory() -> None:
    small = model_cost.cost(retyped(planned_gguf.header(num_hidden_layers=2), "Q4_0"))
    assert impossible(1e6, small, load_profile("rpi5")) is None


def test_what_was_measured_takes_the_place_of_what_was_guessed() -> None:
    limits = Limits(
        machine="Cortex-A53; cores 0,1,2,3",
        rows=(Limit(1, 1.5e9, 5e9), Limit(4, 3e9, 20e9)),
        kernels=tuple(KernelLimit(kind, 4, 30e9, 9e9, 5e9) for kind in ("Q4_K", "Q6_K")),
        operators=(OperatorLimit(4, 12e-6),),
    )
    cpu = machine.Cpu("Cortex-A53", "aarch64", 4, ("NEON",))
    memory = machine.Memory(2 << 30, 1 << 30, 0, 0, None)
    base = tiny()
    mine = measured_profile(
        limits, cpu, memory, name="kitchen", title="Kitchen", base=base, storage_read_bytes_s=44e6
    )
    assert device.parse(device.to_yaml(mine), origin="x") == mine
    assert mine.total_bytes == 2 << 30
    assert mine.storage.read_mbps == Figure(44.0, "measured", mine.storage.read_mbps.origin)
    assert operator_s(mine, 4) == pytest.approx(12e-6)
    assert predict(cost(), mine).decode.mid > predict(cost(), base).decode.mid
    products = {each.name for each in predict(cost(), mine).inputs if "products" in each.name}
    assert len(products) == 2


def test_a_machine_without_a_profile_gets_one_of_what_was_measured() -> None:
    limits = Limits("unknown CPU; cores 0", (Limit(1, 2e9, 10e9),))
    cpu = machine.Cpu(None, "x86_64", 1, ("AVX2",))
    memory = machine.Memory(None, None, 0, 0, None)
    found = measured_profile(limits, cpu, memory, name="local", title="This machine")
    assert found.read_bytes_s(1) == 2e9
    assert device.parse(device.to_yaml(found), origin="x") == found


def test_the_fastest_path_of_a_core_counts() -> None:
    plain = load_profile("rpi5")
    words = replace(plain.cpu.features, value=("NEON",))
    slow = replace(plain, cpu=replace(plain.cpu, features=words))
    assert predict(cost(), plain).prefill.mid > 1.3 * predict(cost(), slow).prefill.mid
