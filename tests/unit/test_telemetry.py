"""What /proc and /sys say is read right, on any machine; what they do not say is None."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit import telemetry
from edgekit.telemetry import Counters


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


_PI = {
    "proc/loadavg": "0.42 0.30 0.20 1/200 1234\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2400000\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/class/thermal/thermal_zone0/temp": "61750\n",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50005\n",
}


def test_a_hot_pi_tells_its_clocks_heat_and_what_slows_it_down(tmp_path: Path) -> None:
    found = telemetry.conditions(_tree(tmp_path, _PI))
    assert found == telemetry.Conditions(
        load_1m=0.42,
        clock_mhz=2400.0,
        top_clock_mhz=2400.0,
        governor="ondemand",
        temperature_c=61.75,
        throttling=("under-voltage", "throttled"),
    )


def test_a_machine_that_says_nothing_gives_none_and_no_error(tmp_path: Path) -> None:
    found = telemetry.conditions(tmp_path)
    assert set(vars(found).values()) == {None}
    assert telemetry.counters(tmp_path) == Counters()
    none = telemetry.strain(Counters(), Counters(), 1.0)
    assert set(vars(none).values()) == {None}


@pytest.mark.parametrize(
    "name", [name for name in _PI if not name.endswith("governor")], ids=lambda name: name[-12:]
)
def test_nonsense_in_a_file_is_none(name: str, tmp_path: Path) -> None:
    found = telemetry.conditions(_tree(tmp_path, {name: "\xff nonsense 12x \0"}))
    assert set(vars(found).values()) == {None}


def test_a_sensor_that_is_off_is_not_the_temperature(tmp_path: Path) -> None:
    files = {
        "sys/class/thermal/thermal_zone0/temp": "-274000\n",
        "sys/class/hwmon/hwmon1/temp1_input": "45500\n",
        "sys/class/hwmon/hwmon1/temp2_input": "65535000\n",
    }
    assert telemetry.conditions(_tree(tmp_path, files)).temperature_c == 45.5


def _stat(user: int, idle: int, steal: int) -> dict[str, str]:
    return {"proc/stat": f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"}


def test_other_processes_and_the_host_are_told_from_our_own_work(tmp_path: Path) -> None:
    before = telemetry.counters(_tree(tmp_path / "before", _stat(1000, 1000, 0)))
    after = telemetry.counters(_tree(tmp_path / "after", _stat(1700, 1200, 100)))
    found = telemetry.strain(before, after, own_cpu_s=4.0)  # of 7 s that were busy, at 100 Hz
    assert found.others_share == pytest.approx(0.3)
    assert found.steal_share == pytest.approx(0.1)


def test_energy_is_that_of_all_packages_also_when_a_counter_starts_anew(tmp_path: Path) -> None:
    def counted(first: int, second: int) -> Counters:
        root = tmp_path / str(first)
        files = {"sys/class/powercap/intel-rapl:0:0/name": "core\n"}  # a part of package-0
        for number, spent in enumerate((first, second)):
            zone = f"sys/class/powercap/intel-rapl:{number}"
            files[f"{zone}/name"] = f"package-{number}\n"
            files[f"{zone}/energy_uj"] = f"{spent}\n"
            files[f"{zone}/max_energy_range_uj"] = "10000000\n"
        assert telemetry.why_no_energy(_tree(root, files)) is None
        return telemetry.counters(root)

    found = telemetry.strain(counted(1_000_000, 9_000_000), counted(3_000_000, 500_000), 0.0)
    assert found.energy_j == pytest.approx(2.0 + 1.5)


def test_a_missing_energy_has_its_reason(tmp_path: Path) -> None:
    assert "no energy counter" in (telemetry.why_no_energy(tmp_path) or "")
    zone = "sys/class/powercap/intel-rapl:0"
    _tree(tmp_path, {f"{zone}/name": "package-0\n", f"{zone}/energy_uj": "not for you\n"})
    assert "only root may read" in (telemetry.why_no_energy(tmp_path) or "")


@pytest.mark.parametrize(
    ("before", "after", "throttled"),
    [("0", "0", False), ("0", "40000", True), ("50000", "50000", False), ("50005", "50005", True)],
)
def test_throttling_during_the_run_is_told_from_throttling_before_it(
    before: str, after: str, throttled: bool, tmp_path: Path
) -> None:
    looks = [
        telemetry.counters(
            _tree(tmp_path / name, {"sys/devices/platform/soc/soc:firmware/get_throttled": bits})
        )
        for name, bits in (("a", before), ("b", after))
    ]
    assert telemetry.strain(*looks, own_cpu_s=0.0).throttled is throttled


def test_this_machine_can_be_read() -> None:
    found = telemetry.counters(Path("/"))
    assert found.busy_s is not None and found.busy_s > 0
