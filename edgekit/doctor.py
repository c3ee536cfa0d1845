"""What this machine offers, what the engine makes of it, and where the two disagree.

Knows installed packages and llama.cpp's CPU backends; never changes anything, and never loads a
model.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from edgekit import __version__, _fs, _proc, machine
from edgekit.errors import DISTRIBUTION, EdgekitError
from edgekit.llama_library import Card
from edgekit.machine import Cpu, Memory

_GIB = 1 << 30

# The CPU backends of the wheel that scripts/build makes, and what each needs of the CPU
# (ggml/src/CMakeLists.txt of llama.cpp; a test compares the two).
_AVX2 = ("SSE42", "AVX", "F16C", "FMA", "AVX2", "BMI2")
_FP16 = ("DOTPROD", "FP16_VECTOR_ARITHMETIC")
VARIANTS = {
    "x64": (),
    "sse42": ("SSE42",),
    "sandybridge": ("SSE42", "AVX"),
    "ivybridge": ("SSE42", "AVX", "F16C"),
    "piledriver": ("SSE42", "AVX", "F16C", "FMA"),
    "haswell": _AVX2,
    "alderlake": (*_AVX2, "AVX_VNNI"),
    "skylakex": (*_AVX2, "AVX512"),
    "cannonlake": (*_AVX2, "AVX512", "AVX512_VBMI"),
    "cascadelake": (*_AVX2, "AVX512", "AVX512_VNNI"),
    "icelake": (*_AVX2, "AVX512", "AVX512_VBMI", "AVX512_VNNI"),
    "cooperlake": (*_AVX2, "AVX512", "AVX512_VNNI", "AVX512_BF16"),
    "zen4": (*_AVX2, "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"),
    "sapphirerapids": (
        *(*_AVX2, "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16"),
        *("AMX_TILE", "AMX_INT8"),
    ),
    "armv8.0_1": (),
    "armv8.2_1": ("DOTPROD",),
    "armv8.2_2": _FP16,
    "armv8.2_3": (*_FP16, "SVE"),
    "armv8.6_1": (*_FP16, "SVE", "MATMUL_INT8"),
    "armv8.6_2": (*_FP16, "SVE", "MATMUL_INT8", "SVE2"),
    "armv9.2_1": (*_FP16, "SVE", "MATMUL_INT8", "SME"),
    "armv9.2_2": (*_FP16, "SVE", "MATMUL_INT8", "SVE2", "SME"),
}
# llama.cpp reports two features under other names than it builds them.
_REPORTED_AS = {"FP16_VECTOR_ARITHMETIC": "FP16_VA", "SSE42": "SSSE3"}


@dataclass(frozen=True)
class Engine:
    """llama.cpp as installed. ``backend`` is the loaded variant ("zen4"), None for a build without
    run-time variants; ``variants`` are those the wheel holds; ``cards`` are the graphics cards that
    it can use; ``problem`` says why it cannot load.
    """

    version: str | None
    backend: str | None = None
    variants: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    cards: tuple[Card, ...] = ()
    problem: str | None = None


@dataclass(frozen=True)
class Extra:
    """An optional part of edgekit: what of it is missing, and the line that installs it."""

    installed: bool
    missing: tuple[str, ...]
    install: str


@dataclass(frozen=True)
class Report:
    """Everything doctor found; ``warnings`` are sentences, worst first."""

    cpu: Cpu
    board: str | None
    cpu_limit: float | None
    engine: Engine
    memory: Memory
    home: str
    disk_free_bytes: int
    versions: Mapping[str, str]
    extras: Mapping[str, Extra]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(root: Path | None = None, engine: Engine | None = None) -> Report:
    """Look at the machine below ``root`` (default: EDGEKIT_SYSROOT, or ``/``).

    ``engine`` None asks the installed llama.cpp, in a child process: on a CPU it was not built for
    it dies, and that is a finding, not the end of doctor.
    """
    root = root or machine.root()
    cpu = machine.cpu(root)
    memory = machine.memory(root)
    cpu_limit = machine.cpu_limit(root)
    engine = engine or probe_engine()
    home = _fs.home("cache")
    free = _fs.free_bytes(home)
    return Report(
        cpu=cpu,
        board=machine.board(root),
        cpu_limit=cpu_limit,
        engine=engine,
        memory=memory,
        home=str(home),
        disk_free_bytes=free,
        versions=_versions(),
        extras=_extras(),
        warnings=(
            *engine_warnings(cpu, engine),
            *_machine_warnings(
                cpu, memory, cpu_limit, free, pointer_bits=sys.maxsize.bit_length() + 1
            ),
        ),
    )


def best_variant(cpu: Cpu, variants: tuple[str, ...]) -> str | None:
    """Of the variants that ``cpu`` can run, the one that uses most of it; None if it runs none."""
    usable = [name for name in variants if set(VARIANTS.get(name, ("?",))) <= set(cpu.features)]
    return max(usable, key=lambda name: len(VARIANTS[name]), default=None)


def probe_engine() -> Engine:
    """Load llama.cpp's CPU backend in a child process and ask it what it is."""
    try:
        version = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return Engine(version=None)
    try:
        answer = _proc.call("edgekit.doctor:ask_engine", {}, timeout_s=60, what="loading llama.cpp")
    except EdgekitError as error:
        return Engine(version=version, problem=error.message)
    return Engine(
        version=version,
        backend=answer["backend"],
        variants=tuple(answer["variants"]),
        features=tuple(answer["features"]),
        cards=tuple(Card(**card) for card in answer["cards"]),
    )


def ask_engine() -> dict[str, Any]:
    """The child's side of ``probe_engine``."""
    from edgekit import llama_library

    info = llama_library.system_info()
    loaded = llama_library.backend_file()
    shipped = sorted(path.name for path in llama_library.libllama_folder().glob("libggml-cpu-*"))
    return {
        "backend": _variant_name(loaded) if loaded else None,
        "variants": [name for name in map(_variant_name, shipped) if name],
        "features": [name for name, on in re.findall(r"(\w+) = (\d+)", info) if on != "0"],
        "cards": [asdict(card) for card in llama_library.cards()],
    }


def _variant_name(file_name: str) -> str | None:
    found = re.fullmatch(r"libggml-cpu-(.+)\.so", file_name)
    return found[1] if found else None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "edgekit": __version__}
    for name in sorted({name for needs in _requirements().values() for name in needs}):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _requirements() -> dict[str, list[str]]:
    """Extra -> the packages it asks for; an extra made of other extras counts theirs."""
    direct: dict[str, list[str]] = {}
    try:
        own = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return {}
    for extra in own.metadata.get_all("Provides-Extra") or []:
        direct[extra] = []
    for line in own.requires or []:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if extra:
            direct[extra[1]].append(line.partition(";")[0].strip())

    def packages(extra: str) -> set[str]:
        names: set[str] = set()
        for line in direct[extra]:
            inner = re.match(rf"{DISTRIBUTION}\[([\w,-]+)\]", line)
            if inner:
                names = names.union(*(packages(name) for name in inner[1].split(",")))
            elif found := re.match(r"[\w.-]+", line):
                names.add(found[0])
        return names

    return {extra: sorted(packages(extra)) for extra in direct}


def _extras() -> dict[str, Extra]:
    extras = {}
    for name, needs in _requirements().items():
        missing = []
        for package in needs:
            try:
                metadata.version(package)
            except metadata.PackageNotFoundError:
                missing.append(package)
        extras[name] = Extra(
            installed=not missing,
            missing=tuple(missing),
            install=f"pip install '{DISTRIBUTION}[{name}]'",
        )
    return extras


def engine_warnings(cpu: Cpu, engine: Engine) -> list[str]:
    """Why ``engine`` is not as fast as ``cpu`` allows, one sentence each; none when it is."""
    if engine.problem:
        return [
            f"llama.cpp does not load here: {engine.problem}; make its wheel with scripts/build"
        ]
    if engine.version is None:
        return []
    unused = [
        name
        for name in cpu.features
        if name not in engine.features and _REPORTED_AS.get(name) not in engine.features
    ]
    if engine.backend is None:
        if unused:
            return [
                f"llama.cpp was built without {', '.join(unused)}, which this CPU has: "
                "the wheel of scripts/build is faster"
            ]
        return []
    best = best_variant(cpu, engine.variants)
    if best is None:
        return [f"none of llama.cpp's CPU backends fits this {cpu.architecture} CPU"]
    # With the best variant loaded, a feature that stays unused has no code in llama.cpp.
    if engine.backend != best:
        gain = sorted(set(VARIANTS[best]) - set(VARIANTS.get(engine.backend, ())))
        return [
            f"llama.cpp loaded its backend '{engine.backend}', but '{best}' fits this CPU"
            + (f" and would use {', '.join(gain)}" if gain else "")
        ]
    return []


def _machine_warnings(
    cpu: Cpu, memory: Memory, cpu_limit: float | None, disk_free_bytes: int, *, pointer_bits: int
) -> list[str]:
    warnings = []
    if pointer_bits < 64:
        warnings.append(
            "this Python is 32-bit: there are no wheels for it, and a model cannot use more than "
            "about 3 GiB; install a 64-bit system"
        )
    ceiling = [
        amount for amount in (memory.available_bytes, memory.limit_bytes) if amount is not None
    ]
    if ceiling and min(ceiling) < _GIB:
        warnings.append(
            f"{min(ceiling) / 1e6:.0f} MB of memory can be used: a model of 1 billion weights at "
            "4 bits needs about 1,000 MB"
        )
    if memory.limit_bytes is not None:
        warnings.append(f"a cgroup limits memory to {memory.limit_bytes / 1e6:.0f} MB")
    if memory.swap_used_bytes > memory.swap_total_bytes // 2 > 0:
        warnings.append("more than half of the swap is in use: speeds measured now mean little")
    if memory.swap_total_bytes == 0 and memory.total_bytes and memory.total_bytes < 2 * _GIB:
        warnings.append("there is no swap: when memory runs out the kernel ends the process")
    if cpu_limit is not None and cpu_limit < cpu.cores:
        warnings.append(
            f"a cgroup allows {cpu_limit:g} of {cpu.cores} cores: more threads than that wait"
        )
    if disk_free_bytes < _GIB:
        warnings.append(f"the disk of EDGEKIT_HOME has {disk_free_bytes / 1e6:.0f} MB free")
    return warnings
