"""What each group of channels is worth: how a network does without a part of it; table and picture.

Knows groups, scores and the function that judges; never how channels are scored, or what is judged.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekit import _fs, plot
from edgekit.errors import SourceError
from edgekit.formats import json_file
from edgekit.training.channel_groups import ChannelGroup, Scores, without

SHARES = (0.25, 0.5, 0.75)
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Row:
    """``removed`` of the ``width`` channels of ``group`` are silent, those with the least scores;
    nothing was tuned. ``loss`` and ``accuracy`` are what is left.
    """

    group: str
    width: int
    removed: int
    loss: float
    accuracy: float


def scan(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Scores,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
) -> list[Row]:
    """Every group without 0, a quarter, a half, three quarters of its channels, the others whole
    (Li et al. 2017, "Pruning Filters for Efficient ConvNets", section 3.2). ``network`` is in the
    end as it was.
    """
    network.eval()
    with torch.no_grad():
        whole = evaluate(network)
        rows = []
        for group in groups:
            order = scores[group.name].argsort(stable=True).tolist()
            rows.append(Row(group.name, group.width, 0, whole["loss"], whole["accuracy"]))
            for removed in dict.fromkeys(round(share * group.width) for share in SHARES):
                with without(network, group, order[:removed]):
                    found = evaluate(network)
                rows.append(Row(group.name, group.width, removed, found["loss"], found["accuracy"]))
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """A CSV file, numbers in full."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(field.name for field in fields(Row))
    table.writerows(astuple(row) for row in rows)
    _fs.write_atomic(path, text.getvalue().encode())


def read(path: Path) -> list[Row]:
    """What ``write`` wrote. Raises SourceError."""
    kinds = (str, int, int, float, float)
    try:
        with path.open(newline="") as file:
            _, *lines = csv.reader(file)
        rows = [Row(*(kind(t) for kind, t in zip(kinds, line, strict=True))) for line in lines]
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} is no scan of this run: {error}"[:200]) from None
    return rows


def write_json(path: Path, body: Mapping[str, Any]) -> None:
    _fs.write_atomic(path, (json.dumps(body, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote. Raises SourceError."""
    return dict(json_file.read(path, _MAX_BYTES))


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Accuracy over the share of channels that are silent, one line a group.

    Raises MissingExtraError without matplotlib.
    """
    names = list(dict.fromkeys(row.group for row in rows))
    with plot.figure(path, height_in=max(3.0, 0.22 * len(names) + 2.0)) as figure:
        axes = figure.add_subplot()
        for number, name in enumerate(names):
            own = [row for row in rows if row.group == name]
            axes.plot(
                [100 * row.removed / row.width for row in own],
                [100 * row.accuracy for row in own],
                marker="o",
                markersize=3,
                linewidth=1,
                linestyle=("-", "--", ":")[number // len(plot.COLOURS) % 3],
                color=plot.COLOURS[number % len(plot.COLOURS)],
                label=f"{name} ({own[0].width})",
            )
        axes.set_xlabel("channels without a say, %")
        axes.set_ylabel("accuracy, %, nothing tuned")
        axes.legend(title="group (channels)", loc="center left", bbox_to_anchor=(1.0, 0.5))
