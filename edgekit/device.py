"""What a board is: cores, memory, bandwidth, peaks, storage, power; each figure with its source.

Knows the form of a profile and where profiles lie; never how to reach a board, nor how fast a model
runs on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Literal

from edgekit import _fs, _yaml, typed_json
from edgekit.errors import ProfileError, UnknownNameError
from edgekit.machine import FEATURES
from edgekit.registry import DEVICES, did_you_mean

Source = Literal["measured", "published", "assumed"]
MIB = 1 << 20

# Several times what the largest profile has. They bound the time that a hostile one takes.
_MAX_BYTES = 1 << 15
_MAX_VALUES = 1000
_MAX_TEXT = 400
_MAX_FIGURE = 1e9
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_BUILT_IN = "edgekit.devices.profiles"


def _check_source(origin: str) -> None:
    if not 0 < len(origin) <= _MAX_TEXT:
        raise ValueError(f"from needs 1 to {_MAX_TEXT} characters")


def _check_value(value: float) -> None:
    if not 0 < value <= _MAX_FIGURE:
        raise ValueError(f"value must lie above 0, and not above {_MAX_FIGURE:g}")


@dataclass(frozen=True)
class Figure:
    """A number above 0, how it is known, and from where."""

    value: float
    source: Source
    origin: str = field(metadata={"key": "from"})

    def __post_init__(self) -> None:
        _check_value(self.value)
        _check_source(self.origin)


@dataclass(frozen=True)
class AtThreads:
    """A figure that ``threads`` threads reach together."""

    threads: int
    value: float
    source: Source
    origin: str = field(metadata={"key": "from"})

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 512:
            raise ValueError("threads must lie between 1 and 512")
        _check_value(self.value)
        _check_source(self.origin)


@dataclass(frozen=True)
class Words:
    """Names, how they are known, and from where."""

    value: tuple[str, ...]
    source: Source
    origin: str = field(metadata={"key": "from"})

    def __post_init__(self) -> None:
        if any(not 0 < len(word) <= _MAX_TEXT for word in self.value):
            raise ValueError(f"value needs words of 1 to {_MAX_TEXT} characters")
        _check_source(self.origin)


@dataclass(frozen=True)
class Product:
    """What the engine's own product of one tensor type reaches with ``threads`` threads.

    ``decode_gflops`` with one column, ``prefill_gflops`` with 512, ``stream_gflops`` with one and
    weights from memory (``probe.KernelLimit``).
    """

    type: str
    threads: int
    decode_gflops: float
    prefill_gflops: float
    stream_gflops: float
    source: Source
    origin: str = field(metadata={"key": "from"})

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 512:
            raise ValueError("threads must lie between 1 and 512")
        _check_value(self.decode_gflops)
        _check_value(self.prefill_gflops)
        _check_value(self.stream_gflops)
        _check_source(self.origin)


@dataclass(frozen=True)
class CpuProfile:
    """``features`` have llama.cpp's names, those of ``machine.FEATURES``."""

    core: str
    cores: Figure
    clock_mhz: Figure
    features: Words
    l2_kib: Figure | None
    l3_kib: Figure | None

    def __post_init__(self) -> None:
        for name in self.features.value:
            if name not in FEATURES:
                raise ValueError(
                    f"features: '{name}' is unknown; {did_you_mean(name, list(FEATURES))}"
                )


@dataclass(frozen=True)
class MemoryProfile:
    """``total_mib`` is what Linux sees, ``system_mib`` what the system itself keeps of it.

    ``theoretical_gbps`` is what the memory's pins carry; ``read_gbps`` is what threads that only
    read reach. GB/s are 1e9 bytes a second.
    """

    total_mib: Figure
    system_mib: Figure
    theoretical_gbps: Figure | None
    read_gbps: tuple[AtThreads, ...]

    def __post_init__(self) -> None:
        if not self.read_gbps:
            raise ValueError("read_gbps must not be empty")
        if self.system_mib.value >= self.total_mib.value:
            raise ValueError("system_mib leaves nothing of total_mib")


@dataclass(frozen=True)
class Peaks:
    """What dense products reach: GFLOP/s in float32 and float16, GOP/s in int8.

    Empty where the CPU has no instruction that makes them faster than float32.
    """

    float32_gflops: tuple[AtThreads, ...]
    float16_gflops: tuple[AtThreads, ...]
    int8_gops: tuple[AtThreads, ...]

    def __post_init__(self) -> None:
        if not self.float32_gflops:
            raise ValueError("float32_gflops must not be empty")


@dataclass(frozen=True)
class Storage:
    """What models are usually loaded from, and how fast it reads (1e6 bytes a second)."""

    name: str
    read_mbps: Figure


@dataclass(frozen=True)
class Power:
    """Watts of the whole board; None where nobody knows."""

    idle_w: Figure | None
    busy_w: Figure | None


@dataclass(frozen=True)
class Gpu:
    """``shared``: its memory is the board's own. ``launch_us`` is what starting one operator costs.

    ``float16_gflops`` is the rate of float16 products with float32 sums.
    """

    name: str
    shared: bool
    memory_mib: Figure
    bandwidth_gbps: Figure
    float16_gflops: Figure
    launch_us: Figure


@dataclass(frozen=True)
class Variant:
    """The same board with another memory."""

    title: str
    total_mib: Figure


@dataclass(frozen=True)
class DeviceProfile:
    """A board.

    ``board`` is how the device tree's model text begins, None for a PC. ``threads`` decode fastest.
    ``engines`` says which fast paths of each engine it takes. ``products`` and ``operator_us`` (the
    cost of one small operator of the engine) were measured on a board; they may be empty.
    """

    name: str
    title: str
    board: str | None
    architecture: Literal["aarch64", "x86_64"]
    cpu: CpuProfile
    threads: Figure
    memory: MemoryProfile
    peaks: Peaks
    storage: Storage
    power: Power
    gpu: Gpu | None
    engines: dict[str, Words]
    products: tuple[Product, ...]
    operator_us: tuple[AtThreads, ...]
    variants: dict[str, Variant]

    def __post_init__(self) -> None:
        for name in (self.name, *self.variants):
            if not _NAME.fullmatch(name):
                raise ValueError("name: letters, digits, dots, dashes and underscores, at most 63")
            if not name.startswith(self.name):
                raise ValueError(f"variants: a variant's name begins with {self.name}")
        for text in (self.title, self.cpu.core, *self.engines):
            if not (0 < len(text) <= _MAX_TEXT and text.isprintable()):
                raise ValueError(f"texts need 1 to {_MAX_TEXT} printable characters")
        if self.n_threads > self.cpu.cores.value:
            raise ValueError("threads: more than cores")

    @property
    def n_threads(self) -> int:
        """The count that decodes fastest."""
        return int(self.threads.value)

    @property
    def total_bytes(self) -> int:
        """Memory that the system sees."""
        return round(self.memory.total_mib.value * MIB)

    @property
    def available_bytes(self) -> int:
        """Memory that the system leaves to a model."""
        return self.total_bytes - round(self.memory.system_mib.value * MIB)

    def read_bytes_s(self, n_threads: int) -> float:
        """Bytes that ``n_threads`` threads read per second."""
        return 1e9 * at_threads(self.memory.read_gbps, n_threads).value

    def flops(self, n_threads: int) -> float:
        """float32 FLOP per second of ``n_threads`` threads."""
        return 1e9 * at_threads(self.peaks.float32_gflops, n_threads).value

    def product(self, type_name: str, n_threads: int) -> Product | None:
        """The measured product of one tensor type, if there is one."""
        wanted = type_name, n_threads
        return next((p for p in self.products if (p.type, p.threads) == wanted), None)


def at_threads(rows: Sequence[AtThreads], threads: int) -> AtThreads:
    """The row of a thread count; between two rows on the line between them, above all the last.

    Below all it falls with the count, for fewer threads never reach more.
    """
    rows = sorted(rows, key=lambda row: row.threads)
    below = [row for row in rows if row.threads <= threads]
    above = [row for row in rows if row.threads >= threads]
    if not below:
        first = above[0]
        return replace(first, threads=threads, value=first.value * threads / first.threads)
    low = below[-1]
    if low.threads == threads or not above:
        return replace(low, threads=threads)
    high = above[0]
    part = (threads - low.threads) / (high.threads - low.threads)
    return replace(low, threads=threads, value=low.value + part * (high.value - low.value))


def parse(text: str, *, origin: str) -> DeviceProfile:
    """A profile from YAML text; ``origin`` is the file's name for messages.

    Raises ProfileError: ``FILE:LINE: FIELD: what is wrong``.
    """
    marked = _yaml.parse_marked(
        text, origin=origin, error=ProfileError, max_bytes=_MAX_BYTES, max_values=_MAX_VALUES
    )
    try:
        return typed_json.read(DeviceProfile, marked.data, "")
    except typed_json.Mismatch as error:
        place = re.sub(r"\['(.*?)'\]", r".\1", error.where)
        line = marked.lines.get(place, 1)
        shown = place.removeprefix(".") or "profile"
        what = error.what.replace("object", "mapping")
        raise ProfileError(
            f"{origin}:{line}: {shown}: {what}", hint="docs/add-a-device.md has every field"
        ) from None


def to_yaml(profile: DeviceProfile) -> str:
    """The text of ``profile``; ``parse`` reads it back."""
    return _yaml.dump(typed_json.write(profile))


def save(profile: DeviceProfile) -> Path:
    """Keep ``profile`` as the user's own; from now on it goes before a built-in one of its name."""
    text = to_yaml(profile)
    parse(text, origin=profile.name)  # what cannot be read again is not written
    path = _own() / f"{profile.name}.yaml"
    _fs.write_atomic(path, text.encode())
    return path


def _own() -> Path:
    return _fs.home("config") / "profiles"


def _read(file: Traversable) -> DeviceProfile:
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_BYTES + 1).decode("utf-8")
    except OSError as error:
        raise ProfileError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ProfileError(f"{file}: not UTF-8 text") from None
    profile = parse(text, origin=file.name)
    if profile.name != file.name.removesuffix(".yaml"):
        raise ProfileError(f"{file.name}:1: name: the file of {profile.name} has another name")
    return profile


def _files(*, own: bool = True) -> Iterator[tuple[str, Traversable]]:
    """Name and file of every profile; the user's own come first, and the first of a name counts."""
    folder = _own()
    if own and folder.is_dir():
        for path in sorted(folder.glob("*.yaml")):
            yield path.stem, path
    for file in sorted(resources.files(_BUILT_IN).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            yield file.name.removesuffix(".yaml"), file
    for name in DEVICES:
        yield name, DEVICES.load(name)


def every_profile(*, own: bool = True) -> list[DeviceProfile]:
    """All profiles, variants too, by name; ``own``: the user's before the built-in ones.

    Raises ProfileError for a broken one.
    """
    found: dict[str, DeviceProfile] = {}
    for name, file in _files(own=own):
        if name not in found:
            profile = _read(file)
            for each in (profile, *(_variant(profile, name) for name in profile.variants)):
                found.setdefault(each.name, each)
    return [found[name] for name in sorted(found)]


def profiles() -> list[str]:
    """The names that ``load_profile`` takes."""
    return [profile.name for profile in every_profile()]


def load_profile(name: str) -> DeviceProfile:
    """The profile of a board, or of a variant of one (``rpi5-16gb``).

    Raises UnknownNameError with the closest name, ProfileError for a file that breaks the form.
    """
    for own, file in _files():
        if own == name:
            return _read(file)
    for own, file in _files():
        if name.startswith(f"{own}-"):
            profile = _read(file)
            if name in profile.variants:
                return _variant(profile, name)
    raise UnknownNameError(
        f"no device profile is called '{name[:40]}'", hint=did_you_mean(name[:40], profiles())
    )


def _variant(profile: DeviceProfile, name: str) -> DeviceProfile:
    other = profile.variants[name]
    memory = replace(profile.memory, total_mib=other.total_mib)
    return replace(profile, name=name, title=other.title, memory=memory, variants={})


def of_board(board: str, total_bytes: int | None = None) -> DeviceProfile | None:
    """The built-in profile for a device tree's model text; of its variants the one with the nearest
    memory. None where no board begins like that.
    """
    known = [each for each in every_profile() if each.board and board.startswith(each.board)]
    # "Raspberry Pi 3 Model B Plus" begins like "Raspberry Pi 3 Model B" too.
    longest = max((len(each.board or "") for each in known), default=0)
    known = [each for each in known if len(each.board or "") == longest]
    if total_bytes is None:
        return min(known, key=lambda each: len(each.name), default=None)
    return min(known, key=lambda each: abs(each.total_bytes - total_bytes), default=None)
