"""A device profile of what was measured on a machine: what the next prediction is made of.

Knows limits and profiles; never measures anything itself.
"""

from __future__ import annotations

from dataclasses import replace

from edgekit import machine
from edgekit.device import (
    MIB,
    AtThreads,
    CpuProfile,
    DeviceProfile,
    Figure,
    MemoryProfile,
    Peaks,
    Power,
    Product,
    Source,
    Storage,
    Words,
)
from edgekit.probe import Limits

# Cautious figures for a machine that no built-in profile describes.
_CLOCK_MHZ = 2000.0
_STORAGE_MBPS = 100.0
_SYSTEM_PART = 0.125
_GUESS: tuple[Source, str] = "assumed", "a cautious guess: no profile describes this machine"


def measured_profile(
    limits: Limits,
    cpu: machine.Cpu,
    memory: machine.Memory,
    *,
    name: str,
    title: str,
    base: DeviceProfile | None = None,
    storage_read_bytes_s: float | None = None,
) -> DeviceProfile:
    """The profile ``name`` with all that ``limits`` hold.

    ``base`` gives what was not measured: the board's built-in profile, if there is one. Threads are
    the most that were measured.
    """
    origin = f"edgekit devices probe, {limits.machine}"[:400]
    rows = sorted(limits.rows, key=lambda row: row.n_threads)

    def at(value: float, threads: int) -> AtThreads:
        return AtThreads(threads, value, "measured", origin)

    base = base or _unknown(cpu, rows[-1].n_threads)
    total, storage = base.memory.total_mib, base.storage
    if memory.total_bytes:
        total = Figure(memory.total_bytes / MIB, "measured", "/proc/meminfo")
    system = base.memory.system_mib
    if system.value >= total.value / 2:
        system = Figure(total.value * _SYSTEM_PART, *_GUESS)
    if storage_read_bytes_s:
        speed = Figure(storage_read_bytes_s / 1e6, "measured", origin)
        storage = replace(storage, read_mbps=speed)
    return replace(
        base,
        name=name,
        title=title,
        threads=Figure(rows[-1].n_threads, "measured", origin),
        memory=replace(
            base.memory,
            total_mib=total,
            system_mib=system,
            read_gbps=tuple(at(row.read_bytes_s / 1e9, row.n_threads) for row in rows),
        ),
        peaks=replace(
            base.peaks,
            float32_gflops=tuple(at(row.flops_s / 1e9, row.n_threads) for row in rows),
        ),
        storage=storage,
        products=tuple(
            Product(
                kernel.type,
                kernel.n_threads,
                kernel.decode_flops_s / 1e9,
                kernel.prefill_flops_s / 1e9,
                kernel.stream_flops_s / 1e9,
                "measured",
                origin,
            )
            for kernel in limits.kernels
        ),
        operator_us=tuple(at(each.operator_s * 1e6, each.n_threads) for each in limits.operators),
        variants={},
    )


def _unknown(cpu: machine.Cpu, threads: int) -> DeviceProfile:
    """A machine of which only /proc/cpuinfo is known; ``measured_profile`` fills in the rest."""
    facts: tuple[Source, str] = "measured", "/proc/cpuinfo"
    one = (AtThreads(1, 1.0, *_GUESS),)
    return DeviceProfile(
        name="unknown",
        title="unknown",
        board=None,
        architecture="x86_64" if cpu.architecture == "x86_64" else "aarch64",
        cpu=CpuProfile(
            core=cpu.model or "unknown",
            cores=Figure(max(cpu.cores, threads), *facts),
            clock_mhz=Figure(_CLOCK_MHZ, *_GUESS),
            features=Words(cpu.features, *facts),
            l2_kib=None,
            l3_kib=None,
        ),
        threads=Figure(threads, *facts),
        memory=MemoryProfile(
            total_mib=Figure(1024.0, *_GUESS),
            system_mib=Figure(1024.0 * _SYSTEM_PART, *_GUESS),
            theoretical_gbps=None,
            read_gbps=one,
        ),
        peaks=Peaks(one, (), ()),
        storage=Storage("its disk", Figure(_STORAGE_MBPS, *_GUESS)),
        power=Power(None, None),
        gpu=None,
        engines={},
        products=(),
        operator_us=(),
        variants={},
    )
