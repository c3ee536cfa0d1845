"""What /proc and /sys say is read right, on any machine; what they do not say is None."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from edgekit import telemetry
from edgekit.telemetry import Counters


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        fresh = root / f"{name}.fresh"  # moved into place: nobody may read half of it
        fresh.write_text(text)
        fresh.replace(root / name)
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


# What a Raspberry Pi 5 answers, in part.
_ADC = """
   3V7_WL_SW_A current(0)=0.10000000A
   VDD_CORE_A current(7)=2.00000000A
   3V7_WL_SW_V volt(8)=3.70000000V
   VDD_CORE_V volt(15)=0.85000000V
   EXT5V_V volt(24)=5.10000000V
"""


def _firmware(root: Path, **answers: str) -> Path:
    """A vcgencmd that answers with files, and counts the questions."""
    _tree(root, {f"answers/{name}": text for name, text in answers.items()})
    script = f'echo "$1" >> {root}/asked; cat {root}/answers/"$1" || echo error=1'
    _tree(root, {"usr/bin/vcgencmd": f"#!/bin/sh\n{script}\n"})
    (root / "usr/bin/vcgencmd").chmod(0o755)
    return root


def test_the_firmware_is_asked_for_what_no_file_tells(tmp_path: Path) -> None:
    root = _firmware(
        tmp_path,
        measure_temp="temp=61.7'C\n",
        measure_clock="frequency(0)=2400033792\n",
        get_throttled="throttled=0x50005\n",
        pmic_read_adc=_ADC,
    )
    found = telemetry.moment(root, 3.0)
    assert (found.at_s, found.temperature_c, found.clock_mhz) == (3.0, 61.7, 2400.033792)
    assert found.throttling == ("under-voltage", "throttled")
    watts = 0.1 * 3.7 + 2.0 * 0.85
    assert found.power_w == pytest.approx(watts * 1.1451 + 0.5879, abs=1e-3)


def test_where_files_tell_the_firmware_is_left_alone(tmp_path: Path) -> None:
    root = _firmware(_tree(tmp_path, _PI), pmic_read_adc=_ADC)
    assert telemetry.conditions(root).temperature_c == 61.75
    assert not (tmp_path / "asked").exists()


def test_a_firmware_that_refuses_is_asked_once(tmp_path: Path) -> None:
    """Boards without current sensing: no power, and never a guess."""
    root = _firmware(tmp_path)
    for _ in range(3):
        assert telemetry.moment(root, 0.0).power_w is None
    assert (tmp_path / "asked").read_text().split().count("pmic_read_adc") == 1


def test_pressure_and_memory_are_in_every_look(tmp_path: Path) -> None:
    files = {
        "proc/pressure/memory": "some avg10=12.34 avg60=0.00 avg300=0.00 total=5\nfull avg10=1.0\n",
        "proc/meminfo": "MemTotal: 8 kB\nMemAvailable:    7000 kB\n",
    }
    found = telemetry.moment(_tree(tmp_path, files), 0.0)
    assert (found.memory_pressure, found.available_bytes) == (12.34, 7000 << 10)
    assert found.cpu_pressure is None


def test_a_recorder_knows_when_the_processor_was_throttled(tmp_path: Path) -> None:
    flag = "sys/devices/platform/soc/soc:firmware/get_throttled"
    _tree(tmp_path, {flag: "0\n"})
    with telemetry.Recorder(tmp_path, every_s=0.1) as recorder:
        time.sleep(0.35)
        hot_s = time.monotonic()
        _tree(tmp_path, {flag: "4\n"})
        time.sleep(0.35)
        cool_s = time.monotonic()
        _tree(tmp_path, {flag: "0\n"})
        time.sleep(0.35)
        end_s = time.monotonic()
    assert recorder.throttled(hot_s, cool_s) is True
    assert recorder.throttled(cool_s + 0.2, end_s) is False
    assert recorder.throttled(end_s + 60, end_s + 61) is None
    looks = recorder.moments
    assert 8 <= len(looks) <= 13 and looks[0].at_s < 0.05
    assert {look.throttling for look in looks} == {(), ("throttled",)}


def test_this_machine_can_be_read() -> None:
    found = telemetry.counters(Path("/"))
    assert found.busy_s is not None and found.busy_s > 0
