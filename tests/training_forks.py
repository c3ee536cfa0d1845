"""A program that imports torch once and forks runs of a recipe, to be killed or to work together.

    python training_forks.py kill OUT KILLS SEED RECIPE KEY=VALUE...   a run killed KILLS times
    python training_forks.py search OUT KILLS SEED KEY=VALUE...   nas, killed, and its studies
    python training_forks.py spread OUT       points on one process, two copies, two shards
    python training_forks.py commands OUT     how the commands end whose arguments stdin has as JSON
    python training_forks.py join OUT WAY,WAY... RECIPE KEY=VALUE...   one, two copies, two shards

Prints one JSON line. It never computes before it forks, for threads do not survive that.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any


def forked(work: Callable[[], None], **env: str) -> int:
    """The pid of a child that does ``work`` and ends."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(env)
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(out: Path, kills: int, seed: int, recipe: str, pairs: list[str]) -> dict[str, Any]:
    """A whole run into OUT/whole, then one into OUT/cut that is killed at random moments."""
    from edgekit.registry import RECIPES
    from edgekit.training.recipe import train

    RECIPES.load(recipe)  # what it imports is imported once

    def run(name: str) -> int:
        return forked(
            lambda: train(recipe, pairs, out / name, resume=True, say=lambda status: None) and None
        )

    started_s = time.monotonic()
    assert ended(run("whole")) == 0
    whole_s = time.monotonic() - started_s
    moments = random.Random(seed)
    reached: list[int] = []
    while reached.count(-signal.SIGKILL) < kills:
        if (out / "cut").exists():  # it came to its end before the kill: the next one starts anew
            shutil.rmtree(out / "cut")
        pid = run("cut")
        time.sleep(moments.uniform(0.05, 0.9) * whole_s / max(1, kills / 3))
        os.kill(pid, signal.SIGKILL)
        reached.append(ended(pid))
    assert ended(run("cut")) == 0
    return {"ends": reached, "whole_s": whole_s}


def search(out: Path, kills: int, seed: int, pairs: list[str]) -> dict[str, Any]:
    """Searches into OUT/0, OUT/1 and so on, all but the first killed at random moments until they
    were so often; what the study of each held after each start.
    """
    from edgekit.registry import RECIPES
    from edgekit.training.recipe import train

    RECIPES.load("nas")

    def run(name: str) -> int:
        given = ("nas", pairs, out / name)
        return forked(lambda: train(*given, resume=True, say=lambda status: None) and None)

    started_s = time.monotonic()
    assert ended(run("0")) == 0
    whole_s = time.monotonic() - started_s
    moments = random.Random(seed)
    ends: list[int] = []
    studies: list[list[Any]] = [[study(out / "0")]]
    while ends.count(-signal.SIGKILL) < kills or ends[-1]:
        name = str(ends.count(0) + 1)
        if not ends or ends[-1] == 0:
            studies.append([])
        pid = run(name)
        if ends.count(-signal.SIGKILL) < kills:
            time.sleep(moments.uniform(0.05, 0.4) * whole_s)
            os.kill(pid, signal.SIGKILL)
        ends.append(ended(pid))
        assert ends[-1] in (0, -signal.SIGKILL)
        studies[-1].append(study(out / name))
    return {"ends": ends, "studies": studies}


def study(run: Path) -> list[Any]:
    """The trials of a run that have ended, with all that is known of them."""
    path = run / "study.db" if run.exists() else run.with_name(f"{run.name}.training") / "study.db"
    query = "select trial_id, number, state from trials where state in (?, ?, ?) order by number"
    known = ("trial_values", "trial_params", "trial_user_attributes")
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as file:
        found = file.execute(query, ("COMPLETE", "PRUNED", "FAIL")).fetchall()
        return [
            [number, state]
            + [
                sorted(map(repr, file.execute(f"select * from {t} where trial_id = {trial}")))
                for t in known
            ]
            for trial, number, state in found
        ]


def many(processes: int, work: Callable[[], None]) -> list[int]:
    """The pids of ``processes`` children that do ``work`` together, as a launcher starts them."""
    if processes == 1:
        return [forked(work)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    env |= {"LOCAL_WORLD_SIZE": str(processes)}
    return [forked(work, **env, RANK=str(n), LOCAL_RANK=str(n)) for n in range(processes)]


def commands(place: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How ``edgekit ARGUMENTS`` ends, one after the other in the folder ``place``: its exit code,
    and what it printed. ``checkpoints`` is how many find room before the disk is full.
    """
    from edgekit.cli import main
    from edgekit.registry import RECIPES

    for case in cases:
        if case["arguments"][1] in RECIPES:
            RECIPES.load(case["arguments"][1])
    texts = [place / "stdout.txt", place / "stderr.txt"]

    def command(case: dict[str, Any]) -> None:
        for stream, path in zip((sys.stdout, sys.stderr), texts, strict=True):
            stream.flush()
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
        os.chdir(place)
        sys.argv = ["edgekit", *case["arguments"]]
        if "checkpoints" in case:
            fill_the_disk(case["checkpoints"])
        try:
            main()
        except SystemExit as end:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(int(end.code or 0))

    found = []
    for case in cases:
        code = ended(forked(partial(command, case)))
        stdout, stderr = (path.read_text() for path in texts)
        found.append({"code": code, "stdout": stdout, "stderr": stderr})
    return found


def fill_the_disk(checkpoints: int) -> None:
    """After so many checkpoints there is no room for another."""
    from edgekit import _fs
    from edgekit.training import checkpoint

    saved, free = [], _fs.free_bytes
    save = checkpoint.save

    def counted(*given: Any, **more: Any) -> None:
        save(*given, **more)
        saved.append(1)

    checkpoint.save = counted
    _fs.free_bytes = lambda path: free(path) if len(saved) < checkpoints else 1000


WAYS = {"one": ("data", 1), "copies": ("data", 2), "shards": ("fsdp", 2)}


def join(out: Path, ways: list[str], recipe: str, pairs: list[str]) -> dict[str, list[int]]:
    """How the processes end that train a recipe into OUT/WAY, for each of ``ways``."""
    from edgekit.registry import RECIPES
    from edgekit.training.recipe import train

    RECIPES.load(recipe)

    def run(name: str, parallel: str) -> None:
        given = [*pairs, f"parallel={parallel}", "device=cpu"]
        train(recipe, given, out / name, resume=False, say=lambda status: None)

    found = {}
    for name in ways:
        parallel, processes = WAYS[name]
        found[name] = all_ended(many(processes, partial(run, name, parallel)))
    return found


def all_ended(pids: list[int]) -> list[int]:
    """How they end; when one fails the others, which would wait for it, are killed."""
    ends: dict[int, int] = {}
    while len(ends) < len(pids):
        pid, status = os.wait()
        ends[pid] = os.waitstatus_to_exitcode(status)
        if ends[pid]:
            for other in set(pids) - set(ends):
                os.kill(other, signal.SIGKILL)
    return [ends[pid] for pid in pids]


def spread(out: Path) -> dict[str, Any]:
    """The same task on one process, on two with copies and on two with shards, and one stopped."""
    import torch.distributed.fsdp
    from training_data import Points, network, square

    from edgekit.training import run, trainer
    from edgekit.training.settings import Settings

    def fit(name: str, parallel: Any, steps: int) -> None:
        settings = Settings(
            steps=20,
            batch=16,
            accumulate=2,
            lr=1e-2,
            ema=0.9,
            checkpoint_every=5,
            log_every=1,
            parallel=parallel,
            device="cpu",
            threads=1,
        )
        model = network()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0  # it differs from process to process

        def say(status: trainer.Status) -> None:
            if steps and status.step == steps:
                os._exit(0)

        accelerator = run._accelerator(settings)
        task = trainer.Task("points", model, Points(), square, lambda model: {"loss": 0.0})
        found = trainer.fit(task, settings, out / name, accelerator, say)
        if accelerator.is_main_process:
            state = {name: each.double().sum().item() for name, each in found.state.items()}
            body = {"losses": [point[1] for point in found.curve], "state": state}
            (out / f"{name}.json").write_text(json.dumps(body))

    def together(name: str, parallel: str, processes: int, steps: int = 0) -> None:
        pids = many(processes, lambda: fit(name, parallel, steps))
        if steps:
            assert ended(pids[0]) == 0
            for pid in pids[1:]:
                os.kill(pid, signal.SIGKILL)
                ended(pid)
        else:
            ends = [ended(pid) for pid in pids]
            assert ends == [0] * processes, ends

    together("one", "data", 1)
    together("copies", "data", 2)
    together("shards", "fsdp", 2)
    together("stopped", "fsdp", 2, steps=13)
    together("stopped", "fsdp", 2)
    names = ("one", "copies", "shards", "stopped")
    return {name: json.loads((out / f"{name}.json").read_text()) for name in names}


if __name__ == "__main__":
    verb, place, *rest = sys.argv[1:]
    answer: Any
    if verb == "kill":
        answer = kill(Path(place), int(rest[0]), int(rest[1]), rest[2], rest[3:])
    elif verb == "search":
        answer = search(Path(place), int(rest[0]), int(rest[1]), rest[2:])
    elif verb == "commands":
        answer = commands(Path(place), json.load(sys.stdin))
    elif verb == "join":
        answer = join(Path(place), rest[0].split(","), rest[1], rest[2:])
    else:
        answer = spread(Path(place))
    print(json.dumps(answer))
