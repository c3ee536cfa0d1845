"""`edgekit devices show`: parse, call, render."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from edgekit import typed_json
from edgekit.cli import show
from edgekit.device import to_yaml
from edgekit.plan import profile_of


@click.command()
@click.argument("device")
@click.option("--yaml", "as_yaml", is_flag=True, help="The profile itself, to make another of.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(device: str, as_yaml: bool, as_json: bool) -> None:
    """Show the profile of DEVICE: each figure, and how it is known.

    DEVICE is a profile, or one of your devices.
    """
    profile = profile_of(device)
    if as_yaml:
        return click.echo(to_yaml(profile), nl=False)
    body = typed_json.write(profile)
    if as_json:
        return show.as_json(body)
    show.table([(key, str(body[key])) for key in ("name", "title", "board", "architecture")])
    click.echo()
    show.table(list(_figures("", body)), head=("figure", "value", "source", "from"))


def _figures(place: str, value: Any) -> Iterator[tuple[str, str, str, str]]:
    """Every figure below ``value``, and the words that stand beside them."""
    if isinstance(value, list):
        for each in value:
            yield from _figures(_with_key(place, each), each)
    elif isinstance(value, dict) and "source" in value:
        figures = {key: x for key, x in value.items() if key not in ("source", "from", "threads")}
        for key, figure in figures.items():
            name = place if key == "value" else f"{place} {key}"
            if key != "type":
                yield name, _shown(figure), value["source"], value["from"]
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _figures(f"{place}.{key}".lstrip("."), each)


def _with_key(place: str, row: Any) -> str:
    """A list's row by what tells it from the others."""
    if not isinstance(row, dict):
        return place
    kind = f"{row['type']}, " if "type" in row else ""
    return f"{place}, {kind}{row['threads']} threads" if "threads" in row else place


def _shown(figure: Any) -> str:
    if isinstance(figure, list):
        return ", ".join(map(str, figure)) or "-"
    return f"{figure:,.6g}"
