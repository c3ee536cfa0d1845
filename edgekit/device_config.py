"""The user's own devices: their names, how to reach them over SSH, and which profile fits them.

Knows ``devices.yaml`` below the user's config folder, and what a host may look like; never what a
board is, that is a profile's, and it opens no connection.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import _fs, _yaml
from edgekit.errors import UnknownNameError, UsageError
from edgekit.registry import did_you_mean

LOCAL = "local"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# What a host or a user may not be: an option, a path, or anything that a shell or a token of
# ssh_config would make something of. ssh puts both into commands such as ProxyCommand.
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9._-]{0,31}")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9_])?")
_MAX_DEVICES = 1000
_FIELDS = {"ssh", "profile"}


@dataclass(frozen=True)
class Address:
    """Where ssh goes: a host name, an IP address or an alias of ``~/.ssh/config``, and the user."""

    host: str
    user: str | None = None

    def __str__(self) -> str:
        return self.host if self.user is None else f"{self.user}@{self.host}"


@dataclass(frozen=True)
class Device:
    """A device of the user. ``address`` None is this machine; ``profile`` None is unknown."""

    name: str
    address: Address | None
    profile: str | None = None


def address(text: str) -> Address:
    """``[user@]host`` in its parts. Raises UsageError for what could be an option or a command."""
    user, at, host = text.rpartition("@")
    good_host = _HOST.fullmatch(host) is not None or _is_ip(host)
    if not good_host or (at and not _USER.fullmatch(user)):
        raise UsageError(
            f"{text[:80]!a} is no [user@]host that edgekit gives to ssh",
            hint="ports, keys and jump hosts belong into ~/.ssh/config, under a name of your own",
        )
    return Address(host, user if at else None)


def _is_ip(host: str) -> bool:
    try:
        return not getattr(ipaddress.ip_address(host), "scope_id", None)
    except ValueError:
        return False


def find(name: str) -> Device:
    """The device that the user calls ``name``: "local", one that was added, or an SSH host alias.

    Raises UsageError for a name that can be none of these, or a spoilt ``devices.yaml``.
    """
    if name == LOCAL:
        return Device(LOCAL, None)
    return devices().get(name) or Device(name, address(name))


def devices() -> dict[str, Device]:
    """What the user added, by name. Raises UsageError with file, device and field."""
    file = path()
    if not file.exists():
        return {}
    body = _yaml.read(file)
    rows = body.get("devices") if isinstance(body, dict) and set(body) == {"devices"} else None
    if not isinstance(rows, dict) or len(rows) > _MAX_DEVICES:
        raise UsageError(f"{file}: must hold one mapping, called 'devices'")
    return {name: _device(name, row, str(file)) for name, row in rows.items()}


def path() -> Path:
    """The file that keeps them."""
    return _fs.home("config") / "devices.yaml"


def _device(name: str, row: Any, file: str) -> Device:
    where = f"{file}: device {name[:80]!a}"
    if not isinstance(row, dict) or "ssh" not in row or not set(row) <= _FIELDS:
        raise UsageError(f"{where}: needs 'ssh', may have 'profile', and nothing else")
    profile = row.get("profile")
    for value in (row["ssh"], profile):
        if not isinstance(value, str | None):
            raise UsageError(f"{where}: 'ssh' and 'profile' are text")
    try:
        check_name(name)
        if profile is not None and not _NAME.fullmatch(profile):
            raise UsageError(f"{profile[:80]!a} cannot be the name of a profile")
        return Device(name, address(str(row["ssh"])), profile)
    except UsageError as error:
        raise UsageError(f"{where}: {error.message}", hint=error.hint) from None


def check_name(name: str) -> None:
    """Raises UsageError for what cannot be the name of an added device."""
    if name == LOCAL or not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!a} cannot be the name of a device",
            hint="letters, digits, dots, dashes and underscores; 'local' is this machine",
        )


def add(device: Device) -> None:
    """Keep a device, in the place of an earlier one of its name. Raises UsageError, ExportError."""
    check_name(device.name)
    _write(devices() | {device.name: device})


def remove(name: str) -> None:
    """Forget a device. Raises UnknownNameError, ExportError."""
    known = devices()
    if name not in known:
        raise UnknownNameError(
            f"no device of yours is called '{name[:80]}'",
            hint=did_you_mean(name, list(known))
            if known
            else "edgekit devices add NAME --ssh HOST",
        )
    del known[name]
    _write(known)


def _write(known: dict[str, Device]) -> None:
    rows = {}
    for name, device in sorted(known.items()):
        rows[name] = {"ssh": str(device.address)}
        if device.profile is not None:
            rows[name]["profile"] = device.profile
    _fs.write_atomic(path(), _yaml.dump({"devices": rows}).encode(), mode=0o600)
