"""The child of a search: trains one network after the other, and stops those that fall behind.

Knows networks, data and rungs; never the study. It ends when the process ends that started it.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from edgekit import _proc
from edgekit.errors import DivergedError, DoesNotFitError
from edgekit.training import classify, images, residual, trainer
from edgekit.training.search import Standing, goes_on
from edgekit.training.settings import Settings
from edgekit.training.trainer import Status, Task


class _Stopped(Exception):
    """``end`` of a trial before its last step."""

    def __init__(self, end: str) -> None:
        super().__init__(end)
        self.end = end


def serve() -> None:
    """Answer JSON lines on stdin until it ends: for ``_proc.Worker``."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    child = _Child(os.getppid())
    answers.write(b"{}\n")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        call = functools.partial(getattr(child, request["call"]), **request["arguments"])
        _proc.write_all(answers, json.dumps(_proc.answer_of(call)).encode() + b"\n")
    os._exit(0)


class _Child:
    """What can be asked for, by name."""

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def open(self, data: dict[str, Any], parts: dict[str, int], loss: dict[str, Any]) -> None:
        """Load the data: the arguments of ``images.load``, how many images to train on and to hold
        back, and the arguments of ``classify.loss_of``.
        """
        self._data = images.load(**data)
        train = self._data.train.share(parts["train"])
        self._train, self._held = train.parted(parts["held"])
        self._loss = classify.loss_of(self._data, **loss)

    def train(
        self,
        config: dict[str, Any],
        settings: dict[str, Any],
        rungs: list[dict[str, Any]],
        standing: list[float],
        keep: float,
        left_s: float,
    ) -> dict[str, Any]:
        """The accuracies at the rungs that were reached, and how it ended.

        ``rungs`` have a "step" and "rivals", how others stood there; ``standing`` is what is known
        of the network. After ``left_s`` seconds it is cut off.
        """
        until_s = time.monotonic() + left_s
        chosen = replace(Settings(), **settings)
        torch.set_num_threads(chosen.threads or 1)
        found: list[float] = []
        judge = classify.evaluation(self._data, self._held)

        def say(status: Status) -> None:
            if os.getppid() != self._parent:
                os._exit(1)  # nobody is left to be told
            if time.monotonic() > until_s:
                raise _Stopped("fail")

        def evaluate(model: torch.nn.Module) -> dict[str, float]:
            seen = judge(model)
            found.append(seen["accuracy"])
            at = rungs[len(found) - 1]
            rivals = [Standing(*each) for each in at["rivals"]]
            own = Standing(seen["accuracy"], *standing[1:])
            if len(found) < len(rungs) and not goes_on(own, rivals, keep):
                raise _Stopped("pruned")
            return seen

        torch.manual_seed(chosen.seed)
        network = residual.build(config).to(memory_format=torch.channels_last)
        task = Task("trial", network, self._train, self._loss, evaluate)
        place = Path(tempfile.mkdtemp(prefix="edgekit-trial-"))
        try:
            end = "complete"
            trainer.fit(task, chosen, place, Accelerator(cpu=chosen.device == "cpu"), say)
        except _Stopped as stopped:
            end = stopped.end
        except (DivergedError, DoesNotFitError):
            end = "fail"  # of this network; the search goes on
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return {"rungs": found, "end": end}
