"""The course of the learning rate over a run, as a factor of its highest value.

Knows numbers of steps alone; never an optimizer.
"""

from __future__ import annotations

import math

from edgekit.training.settings import Settings


def factor(settings: Settings, step: int) -> float:
    """The factor of ``lr`` for ``step`` (from 0) of ``settings.steps``, between 0 and 1.

    All rise in a straight line over the warm-up. Then "cosine": half a cosine down to ``min_lr``
    (Loshchilov and Hutter 2017, SGDR, section 3, equation 5, without restarts). "wsd": level, and
    in the last ``decay`` of the steps down (Hu et al. 2024, MiniCPM, section 4.2, equation 1, which
    leaves the form of the fall open: here a straight line). "constant": level to the end.
    """
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return (step + 1) / warmup
    low = settings.min_lr
    if settings.schedule == "cosine":
        done = (step - warmup) / max(1, settings.steps - warmup)
        return low + (1 - low) * (1 + math.cos(math.pi * done)) / 2
    if settings.schedule == "wsd":
        falling = max(1, round(settings.decay * settings.steps))
        return low + (1 - low) * min(1.0, (settings.steps - step) / falling)
    return 1.0
