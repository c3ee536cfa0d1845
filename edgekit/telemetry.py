"""How the machine feels while work runs: clocks, heat, throttling, energy, load, stolen time.

Knows /proc and /sys below a root folder (``machine.root``); never what work runs. Everything that
cannot be read is None, and nothing here fails.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgekit import _proc
from edgekit.errors import EdgekitError

_TICKS_S = os.sysconf("SC_CLK_TCK")
# Bits of the Raspberry Pi firmware's get_throttled: now, and 16 bits higher "since the start".
# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
PI_THROTTLING = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
_MOST_MOMENTS = 3600
_VCGENCMD_S = 2.0
_REFUSED: set[tuple[object, ...]] = set()
_PI5_FACTOR, _PI5_OFFSET_W = 1.1451, 0.5879
_PI_FILE = "sys/devices/platform/soc/soc:firmware/get_throttled"
_CPUS = "sys/devices/system/cpu"


@dataclass(frozen=True)
class Conditions:
    """One look at the machine.

    ``load_1m`` is the load average over a minute. ``clock_mhz`` is the fastest core's clock now,
    ``top_clock_mhz`` the highest that the kernel allows. ``temperature_c`` is the hottest sensor's.
    ``throttling`` names what slows the processor down now.
    """

    load_1m: float | None
    clock_mhz: float | None
    top_clock_mhz: float | None
    governor: str | None
    temperature_c: float | None
    throttling: tuple[str, ...] | None


@dataclass(frozen=True)
class Counters:
    """What the kernel has counted since the machine started.

    CPU seconds of all processors together: ``busy_s`` in anybody's work, ``idle_s``, ``steal_s``
    taken by the host of a virtual machine. ``energy_uj`` is package -> (microjoules, where the
    counter starts anew). ``throttle_events`` counts events, or the Pi's sticky bits; these stay
    set, so ``throttled_now`` says whether anything slows the processor down at this moment.
    """

    busy_s: float | None = None
    idle_s: float | None = None
    steal_s: float | None = None
    energy_uj: dict[str, tuple[int, int]] = field(default_factory=dict)
    throttle_events: int | None = None
    throttled_now: bool = False


@dataclass(frozen=True)
class Strain:
    """What happened on the machine between two looks at its counters.

    ``others_share`` and ``steal_share`` are parts of all processors' time: other processes' work,
    and what the host took. ``energy_j`` is that of the whole processor package.
    """

    others_share: float | None
    steal_share: float | None
    energy_j: float | None
    throttled: bool | None


@dataclass(frozen=True)
class Moment:
    """One look of those that are taken every second while work runs; ``at_s`` after the first.

    A pressure is the percentage of the last 10 s in which somebody had to wait for the CPU, for
    memory or for the disk (https://docs.kernel.org/accounting/psi.html). ``power_w`` is what a
    Raspberry Pi 5 takes from its supply.
    """

    at_s: float
    temperature_c: float | None
    clock_mhz: float | None
    throttling: tuple[str, ...] | None
    cpu_pressure: float | None
    memory_pressure: float | None
    io_pressure: float | None
    available_bytes: int | None
    power_w: float | None


class Recorder:
    """Looks at the machine every second, in a thread, from ``with`` to its end."""

    def __init__(self, root: Path, *, every_s: float = 1.0) -> None:
        self._root = root
        self._every_s = every_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._seen: list[tuple[float, Moment]] = []

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        began = time.monotonic()
        while True:
            now = time.monotonic()
            self._seen.append((now, moment(self._root, now - began)))
            # At whole seconds, however long a look takes.
            if self._done.wait(self._every_s - (time.monotonic() - began) % self._every_s):
                return

    @property
    def moments(self) -> tuple[Moment, ...]:
        """What was seen, oldest first; of a very long run only every n-th look."""
        looks = [look for _, look in self._seen]
        return tuple(looks[:: 1 + len(looks) // _MOST_MOMENTS])

    def throttled(self, began_s: float, ended_s: float) -> bool | None:
        """Whether anything slowed the processor down between two times of ``time.monotonic``.

        None if no look that could tell fell in between, or just before or after.
        """
        near = [
            bool(look.throttling)
            for at, look in self._seen
            if began_s - self._every_s <= at <= ended_s + self._every_s
            and look.throttling is not None
        ]
        return any(near) if near else None


def conditions(root: Path) -> Conditions:
    """How the machine is right now."""
    return Conditions(
        load_1m=_load(root),
        clock_mhz=_mhz(root, "scaling_cur_freq") or _pi_clock_mhz(root),
        top_clock_mhz=_mhz(root, "cpuinfo_max_freq"),
        governor=_text(root / _CPUS / "cpu0/cpufreq/scaling_governor"),
        temperature_c=_temperature(root),
        throttling=_throttling_now(root),
    )


def moment(root: Path, at_s: float) -> Moment:
    """How the machine is right now, for a series."""
    available = re.search(r"MemAvailable:\s+(\d{1,15}) kB", _text(root / "proc/meminfo") or "")
    return Moment(
        at_s=round(at_s, 3),
        temperature_c=_temperature(root),
        clock_mhz=_mhz(root, "scaling_cur_freq") or _pi_clock_mhz(root),
        throttling=_throttling_now(root),
        cpu_pressure=_pressure(root, "cpu"),
        memory_pressure=_pressure(root, "memory"),
        io_pressure=_pressure(root, "io"),
        available_bytes=int(available[1]) << 10 if available else None,
        power_w=_pi_power_w(root),
    )


def counters(root: Path) -> Counters:
    """The counters now; ``strain`` compares two looks."""
    busy_s, idle_s, steal_s = _cpu_seconds(root)
    return Counters(
        busy_s=busy_s,
        idle_s=idle_s,
        steal_s=steal_s,
        energy_uj=_energy(root),
        throttle_events=_throttle_events(root),
        throttled_now=bool(_throttling_now(root)),
    )


def strain(before: Counters, after: Counters, own_cpu_s: float) -> Strain:
    """What happened between; ``own_cpu_s`` is the CPU time of our own processes in between."""
    others = steal = None
    if (busy := _rise(before.busy_s, after.busy_s)) is not None:
        idle = _rise(before.idle_s, after.idle_s) or 0.0
        stolen = _rise(before.steal_s, after.steal_s) or 0.0
        if total := busy + idle + stolen:
            others, steal = max(0.0, busy - own_cpu_s) / total, stolen / total
    events = _rise(before.throttle_events, after.throttle_events)
    return Strain(
        others_share=others,
        steal_share=steal,
        energy_j=_joules(before, after),
        throttled=None if events is None else events > 0 or after.throttled_now,
    )


def why_no_energy(root: Path) -> str | None:
    """Why the energy of a run cannot be told; None where it can."""
    if _energy(root):
        return None
    for file in _packages(root):
        if file.exists():
            return f"only root may read {file}"
    return "this machine has no energy counter that Linux knows"


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0 \n")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and re.fullmatch(r"-?\d{1,18}", text, re.ASCII) else None


def _rise(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else max(0.0, after - before)


def _load(root: Path) -> float | None:
    found = re.match(r"(\d+\.\d+) ", _text(root / "proc/loadavg") or "", re.ASCII)
    return float(found[1]) if found else None


def _mhz(root: Path, name: str) -> float | None:
    files = (root / _CPUS).glob(f"cpu[0-9]*/cpufreq/{name}")
    return max((khz / 1e3 for file in files if (khz := _number(file))), default=None)


def _temperature(root: Path) -> float | None:
    zones = (root / "sys/class/thermal").glob("thermal_zone*/temp")
    sensors = (root / "sys/class/hwmon").glob("hwmon*/temp*_input")
    found = [milli / 1e3 for file in (*zones, *sensors) if (milli := _number(file)) is not None]
    if not found and (told := re.match(r"temp=(\d{1,3}\.\d+)", _vcgencmd(root, "measure_temp"))):
        found = [float(told[1])]
    # A sensor that is switched off reads zero, or absurd.
    return max((celsius for celsius in found if 0 < celsius < 150), default=None)


def _pi_bits(root: Path) -> int | None:
    text = _text(root / _PI_FILE) or ""
    if not text:
        text = _vcgencmd(root, "get_throttled").strip().removeprefix("throttled=")
    return int(text, 16) if re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", text) else None


def _pressure(root: Path, what: str) -> float | None:
    text = _text(root / "proc/pressure" / what) or ""
    found = re.match(r"some avg10=(\d{1,3}\.\d+) ", text, re.ASCII)
    return float(found[1]) if found else None


def _vcgencmd(root: Path, *words: str) -> str:
    """What the Raspberry Pi's firmware answers; nothing where there is none, or it refuses.

    Its program takes some milliseconds of a core: it is asked only for what no file tells, and
    never again for what it refused.
    """
    program = root / "usr/bin/vcgencmd"
    asked = (program, *words)
    if asked in _REFUSED or not program.is_file():
        return ""
    try:
        answer = _proc.run([str(program), *words], timeout_s=_VCGENCMD_S)
    except EdgekitError:
        answer = "error=1"
    if "error=" in answer:
        _REFUSED.add(asked)
        return ""
    return answer


def _pi_clock_mhz(root: Path) -> float | None:
    found = re.match(r"frequency\(\d+\)=(\d{1,12})", _vcgencmd(root, "measure_clock", "arm"))
    return int(found[1]) / 1e6 if found else None


def _pi_power_w(root: Path) -> float | None:
    """Volts times amperes of all rails, and what a fit to a meter at the plug adds to them.

    The fit: https://github.com/jfikar/RPi5-power
    """
    text = _vcgencmd(root, "pmic_read_adc")
    found = re.findall(r"(\w+)_([AV]) (?:current|volt)\(\d+\)=(\d{1,4}\.\d+)[AV]", text, re.ASCII)
    amperes = {rail: float(value) for rail, kind, value in found if kind == "A"}
    volts = {rail: float(value) for rail, kind, value in found if kind == "V"}
    both = amperes.keys() & volts.keys()
    if not both:
        return None
    rails_w = sum(amperes[rail] * volts[rail] for rail in both)
    return round(rails_w * _PI5_FACTOR + _PI5_OFFSET_W, 3)


def _throttling_now(root: Path) -> tuple[str, ...] | None:
    bits = _pi_bits(root)
    if bits is None:
        return None
    return tuple(word for bit, word in PI_THROTTLING.items() if bits >> bit & 1)


def _throttle_events(root: Path) -> int | None:
    bits = _pi_bits(root)
    if bits is not None:
        return (bits >> 16 & 0xF).bit_count()
    files = (root / _CPUS).glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
    counts = [count for file in files if (count := _number(file)) is not None]
    return sum(counts) if counts else None


def _cpu_seconds(root: Path) -> tuple[float | None, float | None, float | None]:
    """Busy, idle and stolen seconds, from the first line of /proc/stat (see proc_stat(5))."""
    found = re.match(r"cpu +((?:\d+ ?){8})", _text(root / "proc/stat") or "", re.ASCII)
    if not found:
        return None, None, None
    user, nice, system, idle, io_wait, irq, soft_irq, steal = map(int, found[1].split())
    busy = user + nice + system + irq + soft_irq
    return busy / _TICKS_S, (idle + io_wait) / _TICKS_S, steal / _TICKS_S


def _packages(root: Path) -> Iterator[Path]:
    """The energy counters of whole processor packages: their parts are inside them already."""
    for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
        if (_text(zone / "name") or "").startswith("package"):
            yield zone / "energy_uj"


def _energy(root: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for file in _packages(root):
        spent = _number(file)
        wraps = _number(file.with_name("max_energy_range_uj"))
        if spent is not None and wraps:
            found[file.parent.name] = spent, wraps
    return found


def _joules(before: Counters, after: Counters) -> float | None:
    if not before.energy_uj or before.energy_uj.keys() != after.energy_uj.keys():
        return None
    microjoules = 0
    for name, (start, wraps) in before.energy_uj.items():
        end = after.energy_uj[name][0]
        microjoules += end - start if end >= start else end - start + wraps
    return microjoules / 1e6
