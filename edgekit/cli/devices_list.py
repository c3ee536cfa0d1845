"""`edgekit devices list`: parse, call, render."""

from __future__ import annotations

import click

from edgekit import device_config
from edgekit.cli import show
from edgekit.device import MIB, DeviceProfile, every_profile


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(as_json: bool) -> None:
    """List the boards that edgekit knows.

    First those that you added, then the profiles.
    """
    own, profiles = device_config.devices(), every_profile()
    if as_json:
        body = [
            {"name": each.name, "ssh": str(each.address), "profile": each.profile}
            for each in own.values()
        ]
        return show.as_json({"devices": body, "profiles": [_body(each) for each in profiles]})
    if own:
        rows = [(each.name, str(each.address), each.profile or "-") for each in own.values()]
        show.table(rows, head=("device", "ssh", "profile"))
        click.echo()
    show.table([_row(each) for each in profiles], head=_HEAD)


_HEAD = ("profile", "board", "cores", "memory", "reads GB/s", "GPU")


def _row(profile: DeviceProfile) -> tuple[str, ...]:
    return (
        profile.name,
        profile.title,
        f"{profile.cpu.cores.value:.0f} x {profile.cpu.core}",
        f"{profile.total_bytes / MIB / 1024:.1f} GiB",
        f"{profile.read_bytes_s(profile.n_threads) / 1e9:.1f}",
        profile.gpu.name if profile.gpu else "-",
    )


def _body(profile: DeviceProfile) -> dict[str, object]:
    return {
        "name": profile.name,
        "title": profile.title,
        "architecture": profile.architecture,
        "cores": int(profile.cpu.cores.value),
        "memory_bytes": profile.total_bytes,
        "threads": profile.n_threads,
    }
