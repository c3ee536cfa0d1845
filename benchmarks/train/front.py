#!/usr/bin/env python3
"""Accuracy over parameters of `minimal`, from 96,490 down to 5,000, beside 3x3 convolutions.

    benchmarks/train/front.py --out build/train/front [--set steps=4700 ...]

Trains each size, and its baseline of as many parameters for as many steps; prints the table and
draws front.png into the folder. Stopped, it goes on where it was. The data come from
benchmarks/train/fetch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edgekit import plot
from edgekit.cli.ending import ending
from edgekit.training.recipe import train

# Widths and blocks: the depth stays while it can, for it brings the neighbours.
SIZES = {
    "96k": ("48,112", "4,5"),
    "45k": ("32,76", "4,5"),
    "18k": ("20,48", "4,5"),
    "9k": ("16,32", "3,5"),
    "5k": ("12,24", "3,4"),
}
SETTINGS = ("steps=1500", "eval_every=0", "threads=1", "latency=no", "precision=bf16")
NAMES = {"shift": "1x1 convolutions and shifts", "conv": "3x3 convolutions"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/train/front"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    keys = {pair.partition("=")[0] for pair in given.set}
    shared = [pair for pair in SETTINGS if pair.partition("=")[0] not in keys] + given.set
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    print("| network | parameters | accuracy | less the baseline, points |")
    print("|---|---|---|---|")
    for size, (widths, blocks) in SIZES.items():
        pairs = [*shared, f"widths={widths}", f"blocks={blocks}"]
        out = (given.out / size).absolute()
        body = train("minimal", pairs, out, resume=True, say=lambda status: None)
        lead = _lead(body)
        for row in body["results"]:
            name, figures = row["name"], row["figures"]
            points[name].append((figures["parameters"], 100 * figures["accuracy"]))
            count, share = points[name][-1]
            print(f"| {NAMES[name]} | {count:,.0f} | {share:.2f}% | {lead} |", flush=True)
            lead = ""
    draw(given.out / "front.png", points)


def _lead(body: dict[str, Any]) -> str:
    """What the report says of both, image by image: value and interval."""
    told = next(each for each in body["remarks"] if each.startswith("accuracy of shift less"))
    return told.rpartition("image by image: ")[2].partition(" points")[0]


def draw(path: Path, points: dict[str, list[tuple[float, float]]]) -> None:
    """Both lines over the number of parameters, as a PNG."""
    with plot.figure(path, width_in=6.0) as figure:
        axes = figure.add_subplot()
        for name, found in points.items():
            counts, shares = zip(*sorted(found), strict=True)
            axes.plot(counts, shares, "o-", label=NAMES[name])
        axes.set_xscale("log")
        ticks = plot.round_numbers(*axes.get_xlim())
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("parameters")
        axes.set_ylabel("accuracy, %")
        axes.legend()


if __name__ == "__main__":
    with ending():
        main()
