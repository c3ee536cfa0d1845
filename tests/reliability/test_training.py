"""Training that is killed, spread over processes, or fed with broken data."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from training_data import digit_folder, picture_folder, prose

from edgekit.training.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parents[2]
FORKS = ROOT / "tests" / "training_forks.py"


def forks(*arguments: str | Path | int, timeout_s: int = 280) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, FORKS, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def curve(path: Path) -> list[list[str]]:
    """All columns but the seconds, digit by digit."""
    with path.open() as file:
        return [row[:4] for row in csv.reader(file)]


def killed_at_random_points(folder: Path, kills: int, recipe: str, *pairs: str) -> None:
    found = forks("kill", folder, kills, 11, recipe, *pairs, timeout_s=280 + 10 * kills)
    whole, cut = folder / "whole", folder / "cut"
    assert found["ends"].count(-9) == kills
    names, others = (
        sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
        for run in (whole, cut)
    )
    assert names == others
    for name in names:
        if name.endswith(".safetensors"):
            assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
        if name.endswith(".csv"):
            assert curve(whole / name) == curve(cut / name), name
    results = [json.loads((run / "training.json").read_text())["results"] for run in (whole, cut)]
    for row in (*results[0], *results[1]):
        for measured in ("mfu", "training_tok_s", "training_bytes"):
            row["figures"].pop(measured, None)
    assert results[0] == results[1]
    left = {path.name for path in folder.iterdir()}
    assert not any(name.endswith((".training", ".partial")) for name in left)


def toy_minimal(folder: Path) -> list[str]:
    pictures = picture_folder(folder / "pictures", each=40)
    toy = ("side=8", "channels=1", "widths=10,20", "blocks=1,1", "flip=no", "shift=0")
    more = ("steps=60", "batch=16", "eval_every=20", "checkpoint_every=7", "threads=1")
    return [f"data={pictures}", *toy, *more, "latency=no"]


def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    killed_at_random_points(tmp_path, 2, "minimal", *toy_minimal(tmp_path))


def toy_tinyllama(folder: Path) -> list[str]:
    (folder / "prose.txt").write_text(prose())
    lines = [
        {"prompt": f"What is {n}?", "answer": f"{n} is {n}.", "chosen": f"{n}.", "rejected": "No."}
        for n in range(80)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = (f"text={folder / 'prose.txt'}", f"pairs={folder / 'pairs.jsonl'}", "size=toy")
    more = ("length=64", "n_ctx=64", "steps=80", "tune_steps=40", "held_tokens=2000")
    last = ("checkpoint_every=9", "latency=no", "precision=fp32", "threads=1", "eval_every=40")
    return [*data, *more, *last]


def train_tinyllama(folder: Path) -> Path:
    """The toy, trained in a process of its own: this one must not compute before it forks."""
    pairs = [f"--set={pair}" for pair in [*toy_tinyllama(folder), "steps=20", "pairs="]]
    given = {pair.partition("=")[2].partition("=")[0]: pair for pair in pairs}
    base = folder / "model" / "base"
    command = [sys.executable, "-m", "edgekit", "train", "tinyllama", *given.values()]
    subprocess.run([*command, "--out", str(base)], check=True, capture_output=True, timeout=280)
    return base


OTHERS = {
    "video": ("frames=4", "side=16", "widths=8,16", "part=4", "clips=300", "test_clips=100"),
    "dual-encoder": (
        *("side=16", "width=32", "depth=1", "text_depth=1", "heads=2", "space=16"),
        *("scenes=500", "test_scenes=100"),
    ),
    "diffusion": (
        *("side=12", "widths=16,16", "blocks=1", "generate=3", "judged=100", "judge_steps=40"),
        "ema=0.9",
    ),
}


# Each recipe, killed

KILLS = 20
LAST = ("threads=1", "latency=no", "checkpoint_every=7")


def pictures_in(folder: Path) -> str:
    return f"data={picture_folder(folder / 'pictures', each=40)}"


def minimal(folder: Path) -> list[str]:
    return [*toy_minimal(folder), "steps=600"]


def tinyllama(folder: Path, more: Sequence[str] = ()) -> list[str]:
    return [*toy_tinyllama(folder), *more]


def finetune(folder: Path, more: Sequence[str]) -> list[str]:
    base = train_tinyllama(folder)
    pairs = (f"model={base}", f"data={folder / 'pairs.jsonl'}", "steps=60", "lr=1e-2", "ema=0.9")
    return [*pairs, *LAST, *more]


def cut_llama(folder: Path, more: Sequence[str] = ()) -> list[str]:
    base = train_tinyllama(folder)
    pairs = (f"model={base}", f"text={folder / 'prose.txt'}", "layers=0.5", "inner=0.5")
    toy = ("length=64", "steps=40", "batch=8", "lr=3e-3", "held_tokens=1000", "precision=fp32")
    return [*pairs, *toy, *LAST, *more]


def finetune_vit(folder: Path) -> list[str]:
    data = pictures_in(folder)
    toy = ("start_steps=30", "width=32", "layers=2", "patch=8", "examples=48", "seeds=1")
    return [data, f"start_{data}", *toy, "rates=1e-3,1e-2", "steps=20", "batch=16", *LAST]


def vit_qat(folder: Path) -> list[str]:
    size = ("side=8", "channels=1", "patch=2", "width=32", "depth=1", "heads=2", "hidden=64")
    more = ("steps=60", "tune_steps=60", "batch=16", "calibration=32", "eval_every=20")
    return [pictures_in(folder), *size, *more, "formats=w4a4,w3a3", *LAST]


def of_digits(folder: Path, recipe: str) -> list[str]:
    more = ("steps=60", "batch=16", "eval_every=20")
    return [f"data={digit_folder(folder / 'digits')}", *OTHERS[recipe], *more, *LAST]


def of_residual_networks(folder: Path, more: Sequence[str]) -> list[str]:
    return [*toy_minimal(folder), "widths=8,12", "steps=120", *more]


KILLED: dict[str, Callable[[Path], list[str]]] = {
    "minimal": minimal,
    "tinyllama": tinyllama,
    "tinyllama of experts": partial(tinyllama, more=("experts=4", "optimizer=adamw")),
    "finetune qlora": partial(finetune, more=("method=qlora",)),
    "finetune preferences": partial(finetune, more=("teach=preferences",)),
    "finetune full": partial(finetune, more=("method=full",)),
    "distill-lm": cut_llama,
    "prune-lm": partial(cut_llama, more=("methods=wanda,width,depth", "tune=yes")),
    "finetune-vit": finetune_vit,
    "vit-qat": vit_qat,
    **{recipe: partial(of_digits, recipe=recipe) for recipe in OTHERS},
    "prune": partial(
        of_residual_networks,
        more=("tune_steps=80", "rounds=2", "chunk=2", "board=rpi5", "held_images=8", "speedup=2"),
    ),
    "distill": partial(
        of_residual_networks,
        more=(
            *("teacher_steps=150", "held_images=8", "features=1", "attention=1"),
            "student_images=20",
        ),
    ),
}
# It ends after hours, not steps: no two searches are the same.
BY_THE_CLOCK = {"nas"}


def test_each_recipe_is_killed_in_some_test() -> None:
    assert {case.partition(" ")[0] for case in KILLED} | BY_THE_CLOCK == set(CATALOGUE)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", KILLED)
def test_twenty_kills_change_nothing(tmp_path: Path, case: str) -> None:
    pairs = once(KILLED[case](tmp_path))
    killed_at_random_points(tmp_path, KILLS, case.partition(" ")[0], *pairs)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_search_keeps_its_trials_and_its_winner_through_twenty_kills(tmp_path: Path) -> None:
    toy = [
        *toy_minimal(tmp_path)[:3],
        "channels=1",
        "flip=no",
        "shift=0",
        "threads=1",
        "latency=no",
    ]
    more = ["hours=0.002", "stages=2", "widest=16", "most_blocks=1", "trial_steps=12", "board=rpi5"]
    last = ["held_images=16", "steps=300", "batch=16", "checkpoint_every=7", "eval_every=60"]
    pairs = once([*toy, *more, *last])
    found = forks("search", tmp_path, KILLS, 5, *pairs, timeout_s=1000)
    assert found["ends"].count(-9) == KILLS
    late = 0  # kills after the search had ended, in the final trainings
    for name, studies in enumerate(found["studies"]):
        out = tmp_path / str(name)
        for before, after in itertools.pairwise(studies):
            assert all(trial in after for trial in before)  # kept, and nothing of it changed
            late += before == after == studies[-1]
        trials = studies[-1]
        numbers = [trial[0] for trial in trials]
        assert len(set(numbers)) == len(numbers)
        # What a kill cut off is begun again once at most, as a trial of its own.
        again = [trial for trial in trials if any("'again'" in each for each in trial[4])]
        assert len(again) <= sum(trial[1] == "FAIL" for trial in trials if trial not in again)
        with (out / "trials.csv").open() as file:
            rows = list(csv.DictReader(file))
        described = [trial for trial in trials if any("latency_ms" in each for each in trial[4])]
        assert [int(row["number"]) for row in rows] == [trial[0] for trial in described]
        assert [row["end"].upper() for row in rows] == [trial[1] for trial in described]
        told = json.loads((out / "training.json").read_text())["remarks"]
        assert told[0].startswith(f"{len(rows)} trials in ")
        if name == 0:
            continue  # which was not killed
        # The same study, in a run that nobody kills: the same winner, trained to the same numbers.
        whole = tmp_path / f"{name}-whole"
        work = whole.with_name(f"{whole.name}.training")
        work.mkdir()
        shutil.copy(out / "study.db", work)
        train_in_a_process("nas", pairs, whole)
        bodies = [json.loads((run / "training.json").read_text()) for run in (out, whole)]
        assert bodies[0]["results"] == bodies[1]["results"]
        assert bodies[0]["remarks"] == bodies[1]["remarks"]
        for path in (*out.glob("*.safetensors"), out / "study.db"):
            assert path.read_bytes() == (whole / path.name).read_bytes(), path.name
        for path in out.glob("curve-*.csv"):
            assert curve(path) == curve(whole / path.name)
    assert late, "no kill met a final training"


def train_in_a_process(recipe: str, pairs: Sequence[str], out: Path) -> None:
    sets = [f"--set={pair}" for pair in pairs]
    command = [sys.executable, "-m", "edgekit", "train", recipe, *sets, "--resume"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=280)


# Several processes


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    found = forks("spread", tmp_path)
    one = found.pop("one")
    for name, other in found.items():
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4), name
        assert other["state"] == pytest.approx(one["state"], rel=1e-3, abs=1e-4), name
    # A sharded run that was killed goes on as the one that was not.
    assert found["stopped"]["losses"] == found["shards"]["losses"]


LAUNCHERS = {
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    "torchrun": ("torch.distributed.run", "--nproc_per_node", "2"),
    "accelerate --cpu": ("accelerate.commands.launch", "--cpu", "--num_processes", "2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_starts_processes_that_train_one_model(tmp_path: Path, launcher: str) -> None:
    """The commands of docs/train.md; accelerate's ``--cpu`` starts one process, without a word."""
    pairs = once([*toy_minimal(tmp_path), "steps=12", "device=cpu", "baseline=no"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    by = "--main_process_port" if launcher.startswith("accelerate") else "--master_port"
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], by, port, "-m", "edgekit", "train", "minimal"]
        + [f"--set={pair}" for pair in pairs]
        + ["--json", "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    if launcher == "accelerate --cpu":
        assert done.returncode and "hint: on CPUs: torchrun" in done.stderr
        assert {path.name for path in tmp_path.iterdir()} == {"pictures"}
        return
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # of one process
    body = json.loads((out / "training.json").read_text())
    assert body["processes"] == told["processes"] == 2 and body["phases"][0]["steps"] == 12
    assert [row["name"] for row in body["results"]] == ["shift"]
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "out"}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, pairs, and a model that is their toy."""
    folder = tmp_path_factory.mktemp("small")
    train_tinyllama(folder)
    return folder


def toy_of(recipe: str, small: Path) -> list[str]:
    """Few steps of ``recipe``, without anything that differs from process to process."""
    last = ["threads=1", "latency=no", "precision=fp32", "steps=12", "batch=8", "log_every=1"]
    if recipe == "tinyllama":
        return once([*toy_tinyllama(small), "tune_steps=6", "eval_every=0", "ngram=no", *last])
    model = f"model={small / 'model' / 'base'}"
    if recipe == "finetune":
        return [model, f"data={small / 'pairs.jsonl'}", "held=2", *last]
    cut = ["layers=0.5", "inner=0.5", "length=64", "held_tokens=1000"]
    return [model, f"text={small / 'prose.txt'}", *cut, *last]


def once(pairs: list[str]) -> list[str]:
    """The last of those with the same key."""
    return list({pair.partition("=")[0]: pair for pair in pairs}.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("tinyllama", ()),
        ("tinyllama", ("experts=4", "optimizer=adamw", "capacity=9", "balance=0", "twin=no")),
        ("finetune", ("method=lora",)),
        ("finetune", ("method=qlora",)),
        ("finetune", ("method=full",)),
        ("finetune", ("method=lora", "teach=preferences")),
        ("distill-lm", ()),
    ],
)
def test_two_processes_train_a_language_model_as_one_does(
    tmp_path: Path, small: Path, recipe: str, more: tuple[str, ...]
) -> None:
    pairs = once([*toy_of(recipe, small), *more])
    found = forks("join", tmp_path, "one,copies,shards", recipe, *pairs)
    assert found == {"one": [0], "copies": [0, 0], "shards": [0, 0]}
    reports = {name: json.loads((tmp_path / name / "training.json").read_text()) for name in found}
    assert [reports[name]["processes"] for name in found] == [1, 2, 2]
    losses = {
        name: [row["figures"]["loss"] for row in body["results"]] for name, body in reports.items()
    }
    for name in ("copies", "shards"):
        assert losses[name] == pytest.approx(losses["one"], rel=2e-3), name
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            path.name for path in (tmp_path / "one").iterdir()
        }


VISION = {
    "minimal": ("side=8", "widths=10,20", "blocks=1,1", "flip=no", "shift=0"),
    "distill": (
        *("side=8", "channels=1", "widths=8,12", "blocks=1,1", "teacher_steps=12"),
        *("held_images=8", "features=1", "attention=1"),
    ),
    "prune": (
        *("side=8", "channels=1", "widths=8,12", "blocks=1,1", "tune_steps=8", "rounds=2"),
        *("round_share=0.5", "chunk=2", "board=rpi5", "held_images=8", "speedup=1.5"),
        "sparse=no",
    ),
    "vit-qat": (
        *("side=8", "channels=1", "patch=2", "width=32", "depth=1", "heads=2", "hidden=64"),
        *("tune_steps=12", "calibration=32", "formats=w4a4"),
    ),
    "finetune-vit": (
        *("start_steps=10", "width=32", "layers=2", "patch=8", "examples=48", "seeds=1"),
        *("rates=1e-2", "methods=lora,linear,adapter"),
    ),
    **OTHERS,
}
NO_SHARDS = {"dual-encoder"}  # a single number has none: it says so


@pytest.mark.slow
@pytest.mark.parametrize("recipe", VISION)
def test_two_processes_train_a_vision_recipe_to_its_end(tmp_path: Path, recipe: str) -> None:
    """Batch norms and augmentation look at a process's own share, so the numbers differ."""
    drawn = digit_folder if recipe in OTHERS else picture_folder
    data = drawn(tmp_path / "pictures", each=40)
    pairs = [f"data={data}", *VISION[recipe], "steps=12", "batch=16", "threads=1", "latency=no"]
    if recipe == "finetune-vit":
        pairs.append(f"start_data={data}")
    ways = "one,copies" if recipe in NO_SHARDS else "one,copies,shards"
    found = forks("join", tmp_path, ways, recipe, *once(pairs))
    assert set().union(*found.values()) == {0}
    reports = {name: json.loads((tmp_path / name / "training.json").read_text()) for name in found}
    rows = {
        name: [
            # What is pruned goes by scores, which are as different as the numbers.
            (row["name"], row["name"] == "pruned" or row["figures"].get("parameters"))
            for row in body["results"]
        ]
        for name, body in reports.items()
    }
    assert all(each == rows["one"] for each in rows.values())
