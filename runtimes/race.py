"""A race between loaded models: seconds per token, round by round, each in its turn.

Must never judge what it sees, nor know an engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from edgekit import _proc, machine, telemetry
from edgekit.report import BUSY_SHARE, BUSY_STEAL

_FEW = 16  # tokens of a prompt
MIN_ROUNDS = 3


class Bencher(Protocol):
    """A loaded model for a stopwatch."""

    def prefill(self, n_tokens: int) -> float:
        """Seconds to read a prompt of so many tokens into an empty cache."""
        ...

    def decode(self, n_tokens: int) -> list[float]:
        """Seconds of each of so many steps from an empty cache on."""
        ...


def run(
    benches: Sequence[Bencher], n_prompt: int, n_gen: int, rounds: int, budget_s: float
) -> dict[str, Any]:
    """Seconds per token of reading a prompt, and of single steps, round by round.

    Each round times every model with ``n_prompt`` tokens and ``n_gen`` steps, fewer where
    MIN_ROUNDS would take more than ``budget_s``; who goes first changes. Ends after ``rounds``
    rounds, or when ``budget_s`` is over and MIN_ROUNDS are done. Answers {"prefill": [[s, ...],
    ...], "decode": ...}, a list for each model, with "n_prompt", "n_gen", and "busy": whether
    others kept the machine working.
    """
    round_s = 0.0
    for bench in benches:
        bench.prefill(_FEW)  # touches all memory for the first time
        round_s += bench.prefill(_FEW) / _FEW * n_prompt
        round_s += sum(bench.decode(2)) / 2 * n_gen
    share = min(1.0, budget_s / MIN_ROUNDS / round_s)
    n_prompt, n_gen = max(_FEW, int(n_prompt * share)), max(2, int(n_gen * share))
    prefill: list[list[float]] = [[] for _ in benches]
    decode: list[list[float]] = [[] for _ in benches]
    counters, own_s = telemetry.counters(machine.root()), time.process_time()
    started = time.perf_counter()
    for turn in range(rounds):
        if turn >= MIN_ROUNDS and time.perf_counter() - started > budget_s:
            break
        for side in range(len(benches)) if turn % 2 else reversed(range(len(benches))):
            prefill[side].append(benches[side].prefill(n_prompt) / n_prompt)
            decode[side].append(sum(benches[side].decode(n_gen)) / n_gen)
        _proc.report([turn + 1, rounds])
    own_s = time.process_time() - own_s
    strain = telemetry.strain(counters, telemetry.counters(machine.root()), own_s)
    return {
        "prefill": prefill,
        "decode": decode,
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "busy": (strain.others_share or 0) > BUSY_SHARE or (strain.steal_share or 0) > BUSY_STEAL,
    }
