"""A profile says what a board is: where each figure stands, how it is known, and from where."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import profiles as sample
import pytest

from edgekit import _yaml, device, typed_json
from edgekit.device import DeviceProfile, at_threads, load_profile, of_board
from edgekit.errors import ProfileError, UnknownNameError

ROOT = Path(__file__).resolve().parents[2]
BOARDS = [
    *("rpi5", "rpi5-4gb", "rpi5-16gb", "rpi4", "rpi3b-plus", "rpi-zero2w", "jetson-orin-nano"),
    *("laptop-x86-avx2", "laptop-x86-avx512", "macbook-m", "gpu-4gb", "n150"),
]


def tiny(**changes: Any) -> DeviceProfile:
    return device.parse(_yaml.dump(sample.body() | changes), origin="tiny.yaml")


@pytest.mark.parametrize("name", BOARDS)
def test_every_promised_board_has_a_profile(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert 0 < profile.available_bytes < profile.total_bytes
    assert 1 <= profile.n_threads <= profile.cpu.cores.value
    assert name in device.profiles()


def test_no_board_reads_more_than_its_memory_s_pins_carry() -> None:
    for profile in device.every_profile():
        limit = profile.memory.theoretical_gbps
        assert limit is None or all(row.value < limit.value for row in profile.memory.read_gbps)


def test_the_schema_file_says_what_profiles_are_read_as() -> None:
    """To write it anew: print(json.dumps(typed_json.schema(...), indent=1)) of this."""
    written = json.loads((ROOT / "devices/schema.json").read_text())
    assert written == typed_json.schema(DeviceProfile, "A board, as devices/profiles holds it")


def test_a_variant_differs_in_memory_alone() -> None:
    small, large = load_profile("rpi5-4gb"), load_profile("rpi5-16gb")
    assert small.total_bytes < load_profile("rpi5").total_bytes < large.total_bytes
    assert small.cpu == large.cpu and small.memory.read_gbps == large.memory.read_gbps


def test_an_unknown_board_is_told_from_a_near_one() -> None:
    with pytest.raises(UnknownNameError, match="rpi6") as caught:
        load_profile("rpi6")
    assert caught.value.hint == "did you mean 'rpi5'?"


@pytest.mark.parametrize(
    ("text", "memory", "name"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0", 4 << 30, "rpi5-4gb"),
        ("Raspberry Pi 5 Model B Rev 1.1", 16 << 30, "rpi5-16gb"),
        ("Raspberry Pi 5 Model B Rev 1.1", None, "rpi5"),
        ("Raspberry Pi 4 Model B Rev 1.4", 8 << 30, "rpi4-8gb"),
        ("Raspberry Pi Zero 2 W Rev 1.0", 1 << 29, "rpi-zero2w"),
        ("NVIDIA Jetson Orin Nano Developer Kit", 8 << 30, "jetson-orin-nano"),
    ],
)
def test_a_board_is_known_by_its_device_tree(text: str, memory: int | None, name: str) -> None:
    found = of_board(text, memory)
    assert found is not None and found.name == name


def test_a_board_that_nobody_described_has_no_profile() -> None:
    assert of_board("Banana Pi BPI-M5", 4 << 30) is None


def test_a_figure_between_two_thread_counts_lies_between_them() -> None:
    rows = tiny().memory.read_gbps
    found = {count: at_threads(rows, count).value for count in (1, 2, 3, 4, 8)}
    assert found == pytest.approx({1: 1.0, 2: 4 / 3, 3: 5 / 3, 4: 2.0, 8: 2.0})
    assert at_threads(rows[1:], 2).value == pytest.approx(1.0)


def test_a_saved_profile_comes_back_and_goes_before_the_built_in_one(home: Path) -> None:
    mine = typed_json.write(load_profile("rpi5")) | {"title": "Mine, measured"}
    path = device.save(device.parse(_yaml.dump(mine), origin="rpi5.yaml"))
    assert path == home / "config/profiles/rpi5.yaml"
    assert load_profile("rpi5").title == "Mine, measured"
    assert device.parse(device.to_yaml(load_profile("rpi5")), origin="x") == load_profile("rpi5")
    assert {each.title for each in device.every_profile(own=False)}.isdisjoint({"Mine, measured"})


def test_a_stranger_s_package_brings_a_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.yaml").write_text(_yaml.dump(sample.body()))
    (tmp_path / "strange_boards.py").write_text(
        "from pathlib import Path\nTINY = Path(__file__).with_name('tiny.yaml')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = metadata.EntryPoint("tiny", "strange_boards:TINY", "edgekit.devices")
    monkeypatch.setattr(
        "edgekit.registry.entry_points",
        lambda group: [point] if group == "edgekit.devices" else [],
    )
    assert load_profile("tiny-2gb").title == "Tiny board, 2 GB"


def _spoilt(place: str, value: Any) -> str:
    body: Any = sample.body()
    inner = body
    *path, last = place.split(".")
    for key in path:
        inner = inner[int(key)] if key.isdigit() else inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return _yaml.dump(body)


@pytest.mark.parametrize(
    ("place", "value", "line", "words"),
    [
        ("cpu.cores.value", "four", "cores:", "cpu.cores.value: must be a number"),
        ("cpu.cores.source", "guessed", "cores:", "source: must be one of measured, published"),
        ("memory.read_gbps", [], "memory:", "memory: read_gbps must not be empty"),
        ("memory.system_mib.value", 4096, "memory:", "system_mib leaves nothing"),
        ("memory.read_gbps.1.threads", 0, "read_gbps:", "threads must lie between 1 and 512"),
        ("cpu.features.value", ["NEON", "DOTPRD"], "cpu:", "did you mean 'DOTPROD'"),
        ("cpu.l2_kib", ..., "cpu:", "cpu: lacks 'l2_kib'"),
        ("storage.speed", 5, "storage:", "storage: has the unknown key 'speed'"),
        ("title", "bell\a", "title:", "title: must be printable text"),
        ("threads.value", 8, "name:", "threads: more than cores"),
        ("threads.value", -1, "threads:", "value must lie above 0"),
        ("threads.from", "", "threads:", "from needs 1 to"),
        ("name", "../../etc", "name:", "name: letters, digits"),
        ("gpu", {"name": "x"}, "gpu:", "gpu: lacks 'bandwidth_gbps'"),
    ],
)
def test_a_wrong_figure_is_named_by_file_line_and_field(
    place: str, value: Any, line: str, words: str
) -> None:
    text = _spoilt(place, value)
    with pytest.raises(ProfileError) as caught:
        device.parse(text, origin="tiny.yaml")
    file, number, rest = str(caught.value).split(":", 2)
    lines = text.splitlines()
    begins = next(i for i, each in enumerate(lines, 1) if each.strip().startswith(line))
    assert file == "tiny.yaml" and words in rest
    assert begins <= int(number) <= begins + 10


def test_a_file_that_lies_about_its_name_is_refused(home: Path) -> None:
    folder = home / "config/profiles"
    folder.mkdir(parents=True)
    (folder / "huge.yaml").write_text(_yaml.dump(sample.body()))
    with pytest.raises(ProfileError, match=r"huge\.yaml:1: name"):
        load_profile("huge")
