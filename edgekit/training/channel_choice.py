"""Which channels to give up for a latency: those that matter least for each millisecond they save.

Knows scores, widths and times; never a weight or a set of data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import _fs
from edgekit.errors import RecipeError
from edgekit.formats import json_file
from edgekit.training.channel_groups import ChannelGroup, Scores
from edgekit.training.convolution_time import Times, total_ms
from edgekit.training.residual import convolutions, knob, turned

_STEPS = 2  # chunks that are tried at once: engines compute some counts no faster than the next


@dataclass(frozen=True)
class Choice:
    """``removed``: group name -> numbers of the channels to cut; ``ms`` is what the rest takes."""

    removed: dict[str, list[int]]
    ms: float

    def write(self, path: Path) -> None:
        _fs.write_atomic(path, json.dumps(vars(self)).encode())


def read(path: Path) -> Choice:
    """What ``Choice.write`` wrote. Raises SourceError."""
    return Choice(**json_file.read(path))


def choose(
    config: Mapping[str, Any],
    shape: tuple[int, int, int],
    groups: Sequence[ChannelGroup],
    scores: Scores,
    times: Times,
    *,
    target_ms: float,
    chunk: int,
    least: Mapping[str, int] | None = None,
) -> Choice:
    """Channels of ``groups`` to cut, until the network of ``config`` takes ``target_ms``.

    A knapsack, filled greedily: again and again the group loses those ``chunk`` channels (down to a
    multiple of it, and never the last of them) whose scores are the least for the time that they
    save (Shen et al. 2022, "Structural Pruning via Latency-Saliency Knapsack", equation 7; the
    greedy form is that of Yang et al. 2018, "NetAdapt", section 3.2). Of a group so many channels
    as ``least`` says stay: scores add up as if channels did not stand in for each other, and so say
    too little of the last ones. Raises RecipeError where the least that is left is still too slow.
    """
    order = {group.name: scores[group.name].argsort(stable=True).tolist() for group in groups}
    left = {group.name: group.width for group in groups}

    def price(name: str, fewer: int) -> float:
        """What the channels are worth that bring the group down to ``fewer``."""
        width = len(order[name])
        numbers = order[name][width - left[name] : width - fewer]
        return float(scores[name][numbers].sum())

    now_ms = total_ms(times, convolutions(config, shape))
    while now_ms > target_ms:
        best: tuple[float, str, int, float] | None = None
        for name, width in left.items():
            highest = (width - 1) // chunk * chunk
            lowest = max((least or {}).get(name, 1) - 1, highest - _STEPS * chunk, 0)
            for fewer in range(highest, lowest, -chunk):
                after = turned(config, knob(name), fewer)
                after_ms = total_ms(times, convolutions(after, shape))
                if after_ms < now_ms:
                    rate = price(name, fewer) / (now_ms - after_ms)
                    if best is None or rate < best[0]:
                        best = rate, name, fewer, after_ms
        if best is None:
            raise RecipeError(
                f"with the fewest channels left everywhere it still takes {now_ms:.3g} ms,"
                f" not {target_ms:.3g}",
                hint="a lower speedup, or a smaller chunk or least",
            )
        _, name, left[name], now_ms = best
        config = turned(config, knob(name), left[name])
    removed = {
        name: sorted(numbers[: len(numbers) - left[name]]) for name, numbers in order.items()
    }
    return Choice({name: numbers for name, numbers in removed.items() if numbers}, now_ms)
