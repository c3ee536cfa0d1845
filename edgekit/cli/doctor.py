"""`edgekit doctor`: renders what edgekit.doctor finds.

Knows only how to print a report; never looks at the machine itself.
"""

from __future__ import annotations

import json

import click

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
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        click.echo("\n".join(_lines(report)))


def _lines(report: Report) -> list[str]:
    rows = [
        ("board", report.board or "-"),
        ("cpu", _cpu(report.cpu, report.cpu_limit)),
        ("features", " ".join(report.cpu.features) or "-"),
        ("engine", _engine(report.engine)),
        ("engine uses", " ".join(report.engine.features) or "-"),
        ("memory", _memory(report.memory)),
        ("disk", f"{_size(report.disk_free_bytes)} free for {report.home}"),
        ("versions", " ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    lines = [f"{name:<12} {text}" for name, text in rows]
    for name, extra in report.extras.items():
        state = "installed" if extra.installed else f"lacks {', '.join(extra.missing)}"
        lines.append(f"{'[' + name + ']':<12} {state}")
        if not extra.installed:
            lines.append(f"{'':<12} {extra.install}")
    lines += [f"{'WARN':<12} {warning}" for warning in report.warnings]
    return lines


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


def _memory(memory: Memory) -> str:
    parts = []
    if memory.available_bytes is not None and memory.total_bytes is not None:
        parts.append(f"{_size(memory.available_bytes)} free of {_size(memory.total_bytes)}")
    parts.append(
        f"swap {_size(memory.swap_used_bytes)} used of {_size(memory.swap_total_bytes)}"
        if memory.swap_total_bytes
        else "no swap"
    )
    if memory.limit_bytes is not None:
        parts.append(f"a cgroup allows {_size(memory.limit_bytes)}")
    return ", ".join(parts)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
