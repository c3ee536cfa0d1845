"""What a probe found on a board, beside its profile, and as a profile of its own.

Knows both forms; never how the figures were taken, nor how the board is reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgekit import machine
from edgekit.device import DeviceProfile
from edgekit.errors import UsageError
from edgekit.measured_profile import measured_profile
from edgekit.probe import KernelLimit, Limit, Limits, OperatorLimit
from edgekit.target import BoardFacts

# Beyond this part of each other a measured and a published figure do not tell of the same thing.
_APART = 0.25


@dataclass(frozen=True)
class Measured:
    """What a board reached. ``busy``: others disturbed it; storage None: it could not be told."""

    rows: tuple[Limit, ...]
    kernels: tuple[KernelLimit, ...]
    operators: tuple[OperatorLimit, ...]
    storage_read_bytes_s: float | None
    busy: bool

    def __post_init__(self) -> None:
        figures = [self.storage_read_bytes_s or 1.0]
        for row in (*self.rows, *self.kernels, *self.operators):
            figures += [value for value in vars(row).values() if not isinstance(value, str)]
        if not self.rows or min(figures) <= 0:
            raise ValueError("a figure must be above 0")


@dataclass(frozen=True)
class Beside:
    """One figure: measured, and what the profile says, if there is one."""

    name: str
    unit: str
    measured: float
    profile: float | None

    @property
    def ratio(self) -> float | None:
        """Measured by profile."""
        return None if self.profile is None else self.measured / self.profile

    @property
    def apart(self) -> bool:
        """Whether the two differ by so much that one of them is wrong."""
        return self.ratio is not None and not 1 - _APART <= self.ratio <= 1 / (1 - _APART)


def beside(found: Measured, profile: DeviceProfile | None) -> list[Beside]:
    """Every measured figure beside the profile's."""
    return list(_beside(found, profile))


def _beside(found: Measured, profile: DeviceProfile | None) -> Iterator[Beside]:
    for row in found.rows:
        known = None if profile is None else profile.read_bytes_s(row.n_threads) / 1e9
        yield Beside(f"memory, {_threads(row)}", "GB/s", row.read_bytes_s / 1e9, known)
    for row in found.rows:
        known = None if profile is None else profile.flops(row.n_threads) / 1e9
        yield Beside(f"float32, {_threads(row)}", "GFLOP/s", row.flops_s / 1e9, known)
    if found.storage_read_bytes_s is not None:
        known = None if profile is None else profile.storage.read_mbps.value
        yield Beside("storage", "MB/s", found.storage_read_bytes_s / 1e6, known)


def _threads(row: Limit) -> str:
    return f"{row.n_threads} thread" + ("s" if row.n_threads > 1 else "")


def as_profile(
    name: str, board: BoardFacts, found: Measured, base: DeviceProfile | None
) -> DeviceProfile:
    """A profile called ``name`` of what was measured; ``base`` has the rest.

    Raises UsageError for an emulated board, and one of an architecture that no profile has.
    """
    if board.emulated:
        raise UsageError("an emulated board has no figures worth keeping")
    if board.architecture not in ("aarch64", "x86_64"):
        raise UsageError(f"profiles are of aarch64 and x86_64, not {board.architecture}")
    return measured_profile(
        Limits(board.cpu or board.architecture, found.rows, found.kernels, found.operators),
        machine.Cpu(board.cpu, board.architecture, board.cores, board.features),
        machine.Memory(board.memory_bytes, None, 0, 0, None),
        name=name,
        title=board.board or board.cpu or name,
        base=base,
        storage_read_bytes_s=found.storage_read_bytes_s,
    )
