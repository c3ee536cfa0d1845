"""The parent's side of a benchmark's child processes: asks, waits, and keeps the samples.

Knows tests and turns; never how the engine is driven, that is ``bench_worker``'s.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import _proc, machine, telemetry
from edgekit.bench_plan import Setting, Sweep, Test
from edgekit.errors import EngineCrashedError
from edgekit.registry import RUNTIME_OF_FORMAT
from edgekit.report import ModelFacts, SessionRow
from edgekit.telemetry import Strain

# What a child needs beside the file: its weights once more (repacked), Python and the engine.
COPIES = 2
CHILD_BYTES = 300 << 20
_START_S = 120
_ANSWER_S = 3600
_WARM_STEPS = 8
_ROOM = 16  # tokens of a session's context beside the test: BOS, and the first of the answer
_FEWEST_TOKENS = 8  # of an answer whose pace means something


def free_bytes() -> int | None:
    """Memory that processes may still take here; None where that cannot be told."""
    memory = machine.memory(machine.root())
    if memory.available_bytes is None or memory.limit_bytes is None:
        return memory.available_bytes
    return min(memory.available_bytes, memory.limit_bytes)


class Child:
    """A ``bench_worker`` process."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._worker = _proc.Worker(
            "edgekit.bench_worker:serve", timeout_s=_START_S, what=f"the process of {what}"
        )

    def ask(self, call: str, **arguments: Any) -> Any:
        """The value of a call there. Raises what it raised, or EngineCrashedError."""
        request = {"call": call, "arguments": arguments}
        answer = self._worker.ask(request, timeout_s=_ANSWER_S)
        if answer is None:
            raise EngineCrashedError(
                f"the process of {self._what} died or hung while it did '{call}'",
                hint="a process that dies at once is often out of memory: see `dmesg`",
            )
        return _proc.value_of(answer)

    def close(self) -> None:
        """End the process; closing twice is fine."""
        self._worker.close()


@dataclass(frozen=True)
class Sample:
    """One repetition: seconds of all, milliseconds of each step, and what the machine felt.

    ``began_s`` and ``ended_s`` are times of ``time.monotonic``.
    """

    seconds: float
    step_ms: tuple[float, ...]
    strain: Strain
    began_s: float
    ended_s: float


class EngineSide:
    """One model with one setting in a process of its own."""

    def __init__(
        self,
        facts: ModelFacts,
        path: Path,
        setting: Setting,
        sweep: Sweep,
        *,
        keep: bool,
        runtime: str = RUNTIME_OF_FORMAT["gguf"],
    ) -> None:
        """``keep``: the process stays between turns; else each turn starts a fresh one."""
        self.facts = facts
        self.setting = setting
        self.sweep = sweep
        self.samples: dict[Test, list[Sample]] = {test: [] for test in setting.tests}
        self.peak_rss_bytes: int | None = None
        self.engine: dict[str, Any] = {}
        self.turn_s = 0.0
        self._path = path
        self._runtime = runtime
        self._keep = keep
        self._child: Child | None = None

    def warm_up(self) -> None:
        """Load, and run every test once, the long ones in short."""
        child = self._opened()
        self.engine = child.ask("engine", runtime_name=self._runtime)
        self._end_turn(child)

    def take_turn(self) -> None:
        """One repetition of every test."""
        child = self._opened()
        for test, samples in self.samples.items():
            samples.append(self._sample(child, test))
        self._end_turn(child)

    def _opened(self) -> Child:
        if self._child is not None:
            return self._child
        self._child = child = Child(f"{self.facts.name} with {self.setting.n_threads} threads")
        setting = self.setting
        child.ask(
            "hold",
            path=str(self._path),
            runtime_name=self._runtime,
            settings={
                "n_ctx": setting.n_ctx,
                "n_batch": self.sweep.n_batch,
                "threads": setting.n_threads,
                "kv_type": setting.kv_type,
                "flash_attention": self.sweep.flash_attention,
                "n_seqs": setting.n_seqs,
            },
        )
        self.turn_s = sum(self._warm_up(child, test) for test in setting.tests)
        return child

    def _warm_up(self, child: Child, test: Test) -> float:
        """Seconds that a repetition will take, more or less."""
        steps = min(test.n_gen, _WARM_STEPS)
        sample = self._sample(child, Test(test.n_prompt, steps, test.n_depth))
        return sample.seconds * (test.n_gen / steps if steps else 1)

    def _sample(self, child: Child, test: Test) -> Sample:
        began_s = time.monotonic()
        if test.n_prompt:
            seen = child.ask("prefill", n_tokens=test.n_prompt)
        else:
            seen = child.ask("decode", n_tokens=test.n_gen, depth=test.n_depth)
        before, after = (telemetry.Counters(**seen[key]) for key in ("before", "after"))
        return Sample(
            seconds=seen["seconds"],
            step_ms=tuple(seen.get("step_ms", ())),
            strain=telemetry.strain(before, after, seen["own_cpu_s"]),
            began_s=began_s,
            ended_s=time.monotonic(),
        )

    def _end_turn(self, child: Child) -> None:
        found = child.ask("peak_rss_bytes")
        if found is not None:
            self.peak_rss_bytes = max(found, self.peak_rss_bytes or 0)
        if self._keep:
            child.ask("rest")  # or its threads would spin into the next one's turn
        else:
            self.close()

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()
            self._child = None


@dataclass(frozen=True)
class _Turn:
    """A session's turn: the time to the first token, and the pace, where they mean something."""

    began_s: float
    ended_s: float
    ttft_s: float | None
    tok_s: float | None


class SessionSide:
    """A user's session of one model, with the first value of each list of the sweep."""

    def __init__(
        self,
        facts: ModelFacts,
        path: Path,
        given: Path,
        sweep: Sweep,
        *,
        longest: int,
        runtime: str,
        kv_type: str,
    ) -> None:
        """``given`` is what the user loads, ``path`` the model's file in it; ``longest`` the
        context that the model was trained for.
        """
        self.facts = facts
        self.turn_s = 0.0
        self._path = path
        self._given = given
        self._runtime = runtime
        self._kv_type = kv_type
        self._asked = sweep.threads[0] if sweep.threads else None
        self._threads = self._asked or 0
        self._depth = sweep.depths[0]
        self._answer = sweep.answers[0] if sweep.answers else 0
        prompt = sweep.prompts[0] if sweep.prompts else 0
        self._n_ctx = min(longest, max(prompt, self._depth + self._answer) + _ROOM)
        self._prompt = min(prompt, self._n_ctx - _ROOM)
        self._n_batch = sweep.n_batch
        self._flash_attention = sweep.flash_attention
        self._child: Child | None = None
        self._cold: dict[str, Any] = {}
        self._warm_s = 0.0
        self._prompt_tokens = self._answer_tokens = 0
        self._turns: list[_Turn] = []

    def threads(self) -> tuple[int, int]:
        """What ``edgekit.load`` takes for decode and for prefill."""
        child = Child(f"a session of {self.facts.name}")  # its memory is no part of the figures
        try:
            decode, prefill = child.ask(
                "threads", given=str(self._given), file=str(self._path), runtime_name=self._runtime
            )
        finally:
            child.close()
        self._threads = self._threads or decode
        return decode, prefill

    def load(self) -> None:
        """Load cold, load warm, and warm up; the session stays open."""
        child = self._opened()
        fields = {
            "n_ctx": self._n_ctx,
            "n_batch": self._n_batch,
            "n_threads": self._asked,
            "kv_type": self._kv_type,
            "flash_attention": self._flash_attention,
        }
        call = {
            "given": str(self._given),
            "file": str(self._path),
            "fields": fields,
            "runtime_name": self._runtime,
        }
        self._cold = child.ask("open", cold=True, **call)
        self._warm_s = child.ask("open", cold=False, **call)["seconds"]
        self.take_turn()
        self._turns.clear()

    def _opened(self) -> Child:
        if self._child is None:
            self._child = Child(f"a session of {self.facts.name}")
        return self._child

    def take_turn(self) -> None:
        """One first token and one answer, from an empty cache."""
        began_s = time.monotonic()
        ttft_s = tok_s = None
        child = self._opened()
        self.turn_s = 0.0
        if self._prompt:
            seen = child.ask("first_token", n_tokens=self._prompt)
            ttft_s = seen["seconds"]
            self._prompt_tokens = seen["prompt_tokens"]
            self.turn_s += seen["seconds"]
        if self._answer:
            seen = child.ask("answer", n_tokens=self._answer, depth=self._depth)
            self._answer_tokens = seen["tokens"]
            if seen["tokens"] >= _FEWEST_TOKENS:
                tok_s = seen["tok_s"]
            self.turn_s += seen["seconds"]
        self._turns.append(_Turn(began_s, time.monotonic(), ttft_s, tok_s))
        child.ask("rest")

    def row(self, recorder: telemetry.Recorder) -> SessionRow:
        """What was found, without the turns in which the processor was throttled, if others are."""
        free = [turn for turn in self._turns if not recorder.throttled(turn.began_s, turn.ended_s)]
        turns = free or self._turns
        return SessionRow(
            model=self.facts.name,
            n_threads=self._threads,
            kv_type=self._kv_type,
            prompt_tokens=self._prompt_tokens,
            decode_tokens=self._answer_tokens,
            n_depth=self._depth,
            cold_load_s=None if self._cold["note"] else self._cold["seconds"],
            cold_note=self._cold["note"],
            warm_load_s=self._warm_s,
            ttft_s=tuple(turn.ttft_s for turn in turns if turn.ttft_s is not None),
            decode_tok_s=tuple(turn.tok_s for turn in turns if turn.tok_s is not None),
            peak_rss_bytes=self._opened().ask("peak_rss_bytes"),
        )

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.close()
            self._child = None
