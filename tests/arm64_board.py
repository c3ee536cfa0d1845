"""An arm64 board that QEMU plays: Debian's own programs in a root of their own, behind a real sshd.

QEMU_CPU enforces what each core knows: an instruction too new for it ends the program. How long
anything takes there means nothing.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import sshd

_BINFMT = Path("/proc/sys/fs/binfmt_misc/qemu-aarch64")
_READY_S = 60
_MEMINFO = (
    "MemTotal: {0} kB\nMemFree: {1} kB\nMemAvailable: {1} kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"
)


class Kind(NamedTuple):
    """What a board says of itself, and the core that QEMU plays for it."""

    model: str
    qemu_cpu: str
    part: str
    features: str
    memory_mib: int


# From `cat /proc/cpuinfo` of such boards; the parts are Arm's MIDR numbers.
KINDS = {
    "rpi5": Kind(
        "Raspberry Pi 5 Model B Rev 1.0",
        "cortex-a76",
        "0xd0b",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc"
        " dcpop asimddp",
        8063,
    ),
    "rpi4": Kind(
        "Raspberry Pi 4 Model B Rev 1.4",
        "cortex-a72",
        "0xd08",
        "fp asimd evtstrm crc32 cpuid",
        3792,
    ),
    "rpi-zero2w": Kind(
        "Raspberry Pi Zero 2 W Rev 1.0",
        "cortex-a53",
        "0xd03",
        "fp asimd evtstrm crc32 cpuid",
        # The real one has 416 MiB; QEMU's own translated code would not fit with a model.
        2048,
    ),
}


class EmulatedBoard(sshd.Board):
    """The same handles as for a board that this machine plays itself."""

    def __init__(self, folder: Path, kind: Kind, root: Path) -> None:
        self._root = root
        tree = folder / "tree"
        (tree / "proc" / "device-tree").mkdir(parents=True)
        (tree / "proc" / "device-tree" / "model").write_bytes(kind.model.encode() + b"\0")
        processor = (
            "processor\t: {0}\nBogoMIPS\t: 108.00\nFeatures\t: {1}\nCPU implementer\t: 0x41\n"
            "CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: {2}\nCPU revision\t: 1\n\n"
        )
        cpuinfo = "".join(processor.format(i, kind.features, kind.part) for i in range(4))
        (tree / "proc" / "cpuinfo").write_text(cpuinfo)
        total = kind.memory_mib << 10
        (tree / "proc" / "meminfo").write_text(_MEMINFO.format(total, total * 9 // 10))
        super().__init__(folder, {"QEMU_CPU": kind.qemu_cpu, "EDGEKIT_SYSROOT": str(tree)})
        self._cpu = kind.qemu_cpu
        (folder / "there" / "python3").unlink()  # its own is in the root
        self.home.mkdir(parents=True)

    def start(self) -> None:
        """Listen. The root's mounts and processes are in namespaces that end with the sshd.

        The board's folder has the same path inside and outside.
        """
        root, folder = self._root, self.folder
        inside = root / folder.relative_to("/")
        inside.mkdir(parents=True, exist_ok=True)
        (root / "run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)
        script = (
            'root=$1 folder=$2 inside=$3; shift 3; mount --bind "$folder" "$inside" &&'
            ' mount --rbind /dev "$root/dev" && exec chroot "$root" "$@"'
        )
        spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        spaces += [f"--mount-proc={root}/proc", "sh", "-c", script, "sh"]
        spaces += [str(root), str(folder), str(inside)]
        self._process = subprocess.Popen(
            [*spaces, "/usr/sbin/sshd", "-D", "-e", "-f", str(self._config)],
            env=os.environ | {"QEMU_CPU": self._cpu},
            stderr=(folder / "sshd.log").open("wb"),
        )
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                return socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                time.sleep(0.1)
        raise AssertionError((folder / "sshd.log").read_text())


@contextmanager
def unpacked(folder: Path, suite: str = "") -> Iterator[Path]:
    """The root of such a board, fresh; it goes in the end. ``suite``: of another Debian."""
    tar = os.environ.get(f"EDGEKIT_TEST_ROOT{suite and '_'}{suite.upper()}")
    if not tar or os.getuid() != 0 or not _BINFMT.exists():
        pytest.skip("this needs root and an emulated board: run scripts/test-arm64")
    subprocess.run(["tar", "xf", tar, "-C", str(folder), "--numeric-owner"], check=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def board(
    name: str, folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[EmulatedBoard]:
    """A bare board of KINDS that answers to the alias ``board``."""
    made = EmulatedBoard(folder, KINDS[name], root)
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    made.start()
    try:
        yield made
    finally:
        made.stop()
