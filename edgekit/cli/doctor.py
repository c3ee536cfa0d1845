"""`edgekit doctor`: renders what edgekit.doctor finds.

Knows only how to print a report; never looks at the machine itself.
"""

from __future__ import annotations

import click

from edgekit.cli import show
from edgekit.doctor import Engine, Report, examine
from edgekit.machine import Cpu, Memory


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(as_json: bool) -> None:
    """Show what this machine offers, and what the engine makes of it.

    Warns where the two disagree. The exit code is 0 with warnings too: they are advice.
    """
    report = examine()
    if as_json:
        show.as_json(report.to_dict())
    else:
        show.table(_rows(report))


def _rows(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("board", report.board or "-"),
        ("cpu", _cpu(report.cpu, report.cpu_limit)),
        ("features", " ".join(report.cpu.features) or "-"),
        ("engine", _engine(report.engine)),
        ("engine uses", " ".join(report.engine.features) or "-"),
        ("graphics", _cards(report.engine)),
        ("memory", _memory(report.memory)),
        ("disk", f"{show.size(report.disk_free_bytes)} free for {report.home}"),
        ("versions", " ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    for name, extra in report.extras.items():
        state = "installed"
        if not extra.installed:
            state = f"lacks {', '.join(extra.missing)}: {extra.install}"
        rows.append((f"[{name}]", state))
    # The warnings are the answer here, so they go where the rest of it goes.
    rows += [("WARNING", warning) for warning in report.warnings]
    return rows


def _cpu(cpu: Cpu, limit: float | None) -> str:
    text = f"{cpu.model or 'unknown model'}, {cpu.architecture}, {cpu.cores} cores"
    return text if limit is None else f"{text}, a cgroup allows {limit:g}"


def _engine(engine: Engine) -> str:
    if engine.version is None:
        return "llama.cpp is not installed"
    text = f"llama-cpp-python {engine.version}"
    if engine.problem:
        return f"{text}, does not load"
    if engine.backend is None:
        return f"{text}, one fixed CPU backend"
    return f"{text}, backend {engine.backend} of {len(engine.variants)}"


def _cards(engine: Engine) -> str:
    free = [
        f"{card.name}, {show.size(card.free_bytes)} free of {show.size(card.total_bytes)}"
        for card in engine.cards
    ]
    return "; ".join(free) or "none that the engine can use"


def _memory(memory: Memory) -> str:
    parts = []
    if memory.available_bytes is not None and memory.total_bytes is not None:
        parts.append(f"{show.size(memory.available_bytes)} free of {show.size(memory.total_bytes)}")
    parts.append(
        f"swap {show.size(memory.swap_used_bytes)} used of {show.size(memory.swap_total_bytes)}"
        if memory.swap_total_bytes
        else "no swap"
    )
    if memory.limit_bytes is not None:
        parts.append(f"a cgroup allows {show.size(memory.limit_bytes)}")
    return ", ".join(parts)
