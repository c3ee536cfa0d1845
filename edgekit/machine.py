"""What the kernel says of this machine: CPU and its features, memory, cgroup limits, board.

Knows /proc and /sys below a root folder; never an engine, a package or a model. What cannot be read
is None, and nothing here fails.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

# llama.cpp's name of a feature -> the words of /proc/cpuinfo that must all be there.
FEATURES = {
    "SSE42": ("sse4_2",),
    "AVX": ("avx",),
    "F16C": ("f16c",),
    "FMA": ("fma",),
    "AVX2": ("avx2",),
    "BMI2": ("bmi2",),
    "AVX_VNNI": ("avx_vnni",),
    "AVX512": ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"),
    "AVX512_VBMI": ("avx512vbmi",),
    "AVX512_VNNI": ("avx512_vnni",),
    "AVX512_BF16": ("avx512_bf16",),
    "AMX_TILE": ("amx_tile",),
    "AMX_INT8": ("amx_int8",),
    "NEON": ("asimd",),
    "DOTPROD": ("asimddp",),
    "FP16_VECTOR_ARITHMETIC": ("asimdhp",),
    "SVE": ("sve",),
    "MATMUL_INT8": ("i8mm",),
    "SVE2": ("sve2",),
    "SME": ("sme",),
}


_OWN = Path("/proc/self")

# "CPU part" of /proc/cpuinfo (Arm's MIDR_EL1 part numbers) -> the core's name.
CORES = {
    "0xd03": "Cortex-A53",
    "0xd05": "Cortex-A55",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd42": "Cortex-A78AE",
    "0xd49": "Neoverse-N2",
}


@dataclass(frozen=True)
class Cpu:
    """``features`` are llama.cpp's names of what /proc/cpuinfo lists."""

    model: str | None
    architecture: str
    cores: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """Bytes. ``limit_bytes`` is the smallest cgroup limit above this process, None without one."""

    total_bytes: int | None
    available_bytes: int | None
    swap_total_bytes: int
    swap_used_bytes: int
    limit_bytes: int | None


def root() -> Path:
    """Where /proc and /sys lie: EDGEKIT_SYSROOT, so that a fixture tree can play any board."""
    return Path(os.environ.get("EDGEKIT_SYSROOT", "/"))


def board(root: Path) -> str | None:
    """The device tree's name of the board ("Raspberry Pi 5 Model B Rev 1.0"); None on a PC."""
    return _read(root / "proc/device-tree/model")


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0 \n")
    except OSError:
        return None


def cpu(root: Path) -> Cpu:
    """The first processor's model and features, and how many processors there are."""
    return cpu_of(_read(root / "proc/cpuinfo") or "")


def cpu_of(cpuinfo: str) -> Cpu:
    """``cpu`` from the text of a /proc/cpuinfo; what that does not tell is this machine's."""
    fields: dict[str, list[str]] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), []).append(value.strip())
    words = set(" ".join(fields.get("flags", []) + fields.get("Features", [])).split())
    x86 = "flags" in fields
    return Cpu(
        model=_model(fields),
        architecture=_architecture(x86, words),
        cores=len(fields.get("processor", [])) or (os.cpu_count() or 1),
        features=tuple(name for name, needs in FEATURES.items() if words >= set(needs)),
    )


def _model(fields: dict[str, list[str]]) -> str | None:
    if names := fields.get("model name"):
        return names[0]
    parts = fields.get("CPU part", [])
    # The last processor is a big core where there are big and little ones.
    return CORES.get(parts[-1], f"ARM part {parts[-1]}") if parts else None


def _architecture(x86: bool, words: set[str]) -> str:
    if not words:
        return platform.machine()
    if x86:
        return "x86_64" if "lm" in words else "i686"
    return "aarch64" if "asimd" in words else "armv7l"


def total_bytes(meminfo: str) -> int | None:
    """RAM, from the text of a /proc/meminfo."""
    kib = _kib(meminfo)
    return kib["MemTotal"] << 10 if "MemTotal" in kib else None


def _kib(meminfo: str) -> dict[str, int]:
    found = re.findall(r"(\w+):\s+(\d{1,15}) kB", meminfo, re.ASCII)
    return {name: int(value) for name, value in found}


def memory(root: Path) -> Memory:
    """RAM, swap and the cgroup limit of this process."""
    meminfo = _read(root / "proc/meminfo") or ""
    kib = _kib(meminfo)
    swap = kib.get("SwapTotal", 0)
    limits = [int(value) for value in _cgroup(root, "memory", "memory.max") if value.isdigit()]
    limits += [
        int(value) for value in _cgroup(root, "memory", "memory.limit_in_bytes") if value.isdigit()
    ]
    total = total_bytes(meminfo)
    # cgroup v1 writes "no limit" as a number beyond any memory.
    real = [limit for limit in limits if total is None or limit < total]
    return Memory(
        total_bytes=total,
        available_bytes=kib["MemAvailable"] << 10 if "MemAvailable" in kib else None,
        swap_total_bytes=swap << 10,
        swap_used_bytes=(swap - kib.get("SwapFree", swap)) << 10,
        limit_bytes=min(real, default=None),
    )


def peak_bytes() -> int | None:
    """The most that this process ever held in memory, since ``forget_peak`` where that was called;
    None where the system does not tell.
    """
    # Not ru_maxrss, which starts at what the parent held.
    kib = _kib(_read(_OWN / "status") or "")
    return kib["VmHWM"] << 10 if "VmHWM" in kib else None


def forget_peak() -> None:
    """From now on ``peak_bytes`` starts at what is held now (proc(5), clear_refs), if it can."""
    with contextlib.suppress(OSError), open(_OWN / "clear_refs", "wb") as file:
        file.write(b"5")


def cpu_limit(root: Path) -> float | None:
    """Cores that the cgroups above this process allow; None without a limit."""
    shares = []
    for text in _cgroup(root, "cpu", "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            shares.append(int(quota) / int(period))
    quotas = _cgroup(root, "cpu", "cpu.cfs_quota_us")
    periods = _cgroup(root, "cpu", "cpu.cfs_period_us")
    for quota, period in zip(quotas, periods, strict=False):
        if quota.isdigit() and period.isdigit():
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def _cgroup(root: Path, controller: str, name: str) -> list[str]:
    """The values of a cgroup file for this process and every group above it (v2, then v1)."""
    values = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mount = root / "sys/fs/cgroup"
        if controllers:
            if controller not in controllers.split(","):
                continue
            mount = mount / controller
        group = mount / path.strip("/")
        for folder in (group, *group.parents):
            if (value := _read(folder / name)) is not None:
                values.append(value)
            if folder == mount:
                break
    return values
