"""doctor tells the truth about boards that a fixture tree plays."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edgekit import doctor, machine
from edgekit.doctor import Engine, examine

PI5_CPU = """\
processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1

"""  # noqa: E501 (the kernel writes long lines)
ZEN4_FLAGS = (
    "fpu lm sse4_2 avx f16c fma avx2 bmi2 avx512f avx512dq avx512cd avx512bw avx512vl avx512vbmi "
    "avx512_vnni avx512_bf16"
)
ARM_WHEEL = ("armv8.0_1", "armv8.2_1", "armv8.2_2", "armv8.2_3", "armv8.6_1", "armv8.6_2")
X86_WHEEL = ("x64", "sse42", "haswell", "skylakex", "icelake", "zen4", "alderlake")


def _write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _meminfo(total_mb: int, available_mb: int, swap_mb: int = 512, swap_free_mb: int = 512) -> str:
    kib = [("MemTotal", total_mb), ("MemAvailable", available_mb)]
    kib += [("SwapTotal", swap_mb), ("SwapFree", swap_free_mb)]
    return "".join(f"{name}: {mb * 1024:>12} kB\n" for name, mb in kib)


@pytest.fixture
def pi5(tmp_path: Path) -> Path:
    root = tmp_path / "pi5"
    _write(root, "proc/cpuinfo", PI5_CPU * 4 + "Model\t\t: Raspberry Pi 5 Model B Rev 1.0\n")
    _write(root, "proc/meminfo", _meminfo(8058, 7400))
    _write(root, "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    _write(root, "proc/self/cgroup", "0::/user.slice/user-1000.slice/session-1.scope\n")
    return root


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    root = tmp_path / "laptop"
    cpu = f"processor\t: 0\nmodel name\t: AMD Ryzen 7 7840U\nflags\t\t: {ZEN4_FLAGS}\n\n"
    _write(root, "proc/cpuinfo", cpu * 16)
    _write(root, "proc/meminfo", _meminfo(15600, 9000))
    _write(root, "proc/self/cgroup", "0::/\n")
    return root


def test_a_pi5_is_read_as_a_pi5(pi5: Path) -> None:
    engine = Engine("0.3.36", "armv8.2_2", ARM_WHEEL, ("NEON", "ARM_FMA", "FP16_VA", "DOTPROD"))
    report = examine(pi5, engine)
    assert report.board == "Raspberry Pi 5 Model B Rev 1.0"
    assert report.cpu.model == "Cortex-A76"
    assert report.cpu.architecture == "aarch64"
    assert report.cpu.cores == 4
    assert report.cpu.features == ("NEON", "DOTPROD", "FP16_VECTOR_ARITHMETIC")
    assert report.memory.total_bytes == 8058 << 20
    assert report.memory.limit_bytes is None and report.cpu_limit is None
    assert report.warnings == ()


def test_a_baseline_build_on_a_pi5_is_called_out(pi5: Path) -> None:
    (warning,) = examine(pi5, Engine("0.3.36", None, (), ("NEON", "ARM_FMA"))).warnings
    assert "DOTPROD" in warning and "FP16" in warning and "scripts/build" in warning


def test_a_worse_variant_than_the_wheel_holds_is_called_out(laptop: Path) -> None:
    (warning,) = examine(laptop, Engine("0.3.36", "haswell", X86_WHEEL, ("AVX2",))).warnings
    assert "'haswell'" in warning and "'zen4'" in warning and "AVX512_VNNI" in warning


def test_the_best_variant_is_no_reason_to_warn(laptop: Path) -> None:
    """zen4 is the best there is, whatever else the CPU could do."""
    _write(laptop, "proc/cpuinfo", f"processor: 0\nflags: {ZEN4_FLAGS} avx_vnni\n")
    assert examine(laptop, Engine("0.3.36", "zen4", X86_WHEEL, ("AVX512",))).warnings == ()


def test_a_wheel_of_another_architecture_is_called_out(pi5: Path) -> None:
    (warning,) = examine(pi5, Engine("0.3.36", "haswell", X86_WHEEL[2:])).warnings
    assert "aarch64" in warning


def test_an_engine_that_dies_is_a_finding(laptop: Path) -> None:
    (warning,) = examine(laptop, Engine("0.3.36", problem="it was killed by SIGILL")).warnings
    assert "SIGILL" in warning and "scripts/build" in warning


def test_limits_of_a_container_are_seen(laptop: Path) -> None:
    engine = Engine("0.3.36", "zen4", X86_WHEEL)
    _write(laptop, "proc/self/cgroup", "0::/box/inner\n")
    _write(laptop, "sys/fs/cgroup/box/memory.max", f"{2 << 30}\n")
    _write(laptop, "sys/fs/cgroup/box/inner/memory.max", "max\n")
    _write(laptop, "sys/fs/cgroup/box/inner/cpu.max", "150000 100000\n")
    report = examine(laptop, engine)
    assert report.memory.limit_bytes == 2 << 30
    assert report.cpu_limit == 1.5
    assert any("memory to 2147 MB" in warning for warning in report.warnings)
    assert any("1.5 of 16 cores" in warning for warning in report.warnings)


def test_limits_of_an_old_kernel_are_seen(laptop: Path) -> None:
    _write(laptop, "proc/self/cgroup", "4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n")
    _write(laptop, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", f"{3 << 30}\n")
    _write(laptop, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    _write(laptop, "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "-1\n")
    _write(laptop, "sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000\n")
    _write(laptop, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "200000\n")
    _write(laptop, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    report = examine(laptop, Engine(None))
    assert report.memory.limit_bytes == 3 << 30
    assert report.cpu_limit == 2


def test_a_board_short_of_memory_is_warned(pi5: Path) -> None:
    _write(pi5, "proc/meminfo", _meminfo(416, 210, swap_mb=0, swap_free_mb=0))
    warnings = examine(pi5, Engine(None)).warnings
    assert any("220 MB of memory" in warning for warning in warnings)
    assert any("no swap" in warning for warning in warnings)


def test_a_swapping_machine_is_warned(laptop: Path) -> None:
    _write(laptop, "proc/meminfo", _meminfo(15600, 9000, swap_mb=1000, swap_free_mb=200))
    (warning,) = examine(laptop, Engine(None)).warnings
    assert "swap" in warning


def test_an_empty_proc_is_no_reason_to_fail(tmp_path: Path) -> None:
    report = examine(tmp_path, Engine(None))
    assert report.cpu.model is None and report.memory.total_bytes is None


def test_the_variants_are_those_of_llama_cpp(llama_source: Path) -> None:
    """VARIANTS and FEATURES go out of date with llama.cpp: this is where that shows."""
    text = (llama_source / "vendor/llama.cpp/ggml/src/CMakeLists.txt").read_text()
    rows = re.findall(r"ggml_add_cpu_backend_variant\(([\w.]+)\s*([^)]*)\)", text)
    ours = {name: tuple(sorted(needs)) for name, needs in doctor.VARIANTS.items()}
    theirs = {name: tuple(sorted(needs.split())) for name, needs in rows}
    known = {name: needs for name, needs in theirs.items() if set(needs) <= set(machine.FEATURES)}
    foreign = re.compile("android_|apple_|power|z1|riscv")
    assert ours == {name: needs for name, needs in known.items() if not foreign.match(name)}


def test_the_real_engine_answers(cli: Any) -> None:
    done = cli("doctor", "--json")
    assert done.code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["engine"]["problem"] is None
    assert report["engine"]["features"]
    assert report["extras"]["llama"]["installed"] is True


def test_doctor_prints_the_pip_line_of_a_missing_extra(
    pi5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor, "_requirements", lambda: {"serve": ["no-such-package"], "llama": ["numpy"]}
    )
    extras = examine(pi5, Engine(None)).extras
    assert extras["serve"].missing == ("no-such-package",)
    assert extras["serve"].install == "pip install 'edgekit-deploy[serve]'"
    assert extras["llama"].installed


def test_the_sysroot_is_read_from_the_environment(cli: Any, pi5: Path) -> None:
    done = cli("doctor", EDGEKIT_SYSROOT=str(pi5))
    assert done.code == 0
    assert "Cortex-A76, aarch64, 4 cores" in done.stdout
