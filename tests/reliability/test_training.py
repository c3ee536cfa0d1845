"""Training that is killed, spread over processes, or fed with broken data."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_data import digit_folder, picture_folder, prose

ROOT = Path(__file__).resolve().parents[2]
FORKS = ROOT / "tests" / "training_forks.py"


def forks(*arguments: str | Path | int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, FORKS, *map(str, arguments)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def curve(path: Path) -> list[list[str]]:
    """All columns but the seconds, digit by digit."""
    with path.open() as file:
        return [row[:4] for row in csv.reader(file)]


def killed_at_random_points(folder: Path, kills: int, recipe: str, *pairs: str) -> None:
    found = forks("kill", folder, kills, 11, recipe, *pairs)
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
        for speed in ("mfu", "training_tok_s"):
            row["figures"].pop(speed, None)
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


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    pairs = [pair for pair in toy_minimal(tmp_path) if not pair.startswith("steps")]
    killed_at_random_points(tmp_path, 20, "minimal", *pairs, "steps=600")


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


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 4])
def test_three_kills_in_any_phase_of_tinyllama_change_nothing(tmp_path: Path, experts: int) -> None:
    pairs = [*toy_tinyllama(tmp_path), f"experts={experts}"]
    if experts:
        pairs.append("optimizer=adamw")
    killed_at_random_points(tmp_path, 3, "tinyllama", *pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "teach"), [("qlora", "answers"), ("lora", "preferences"), ("full", "answers")]
)
def test_kills_change_nothing_in_a_model_that_is_taught_anew(
    tmp_path: Path, method: str, teach: str
) -> None:
    base = train_tinyllama(tmp_path)
    pairs = (f"model={base}", f"data={tmp_path / 'pairs.jsonl'}", f"method={method}")
    more = (f"teach={teach}", "steps=60", "lr=1e-2", "checkpoint_every=7", "threads=1")
    killed_at_random_points(tmp_path, 3, "finetune", *pairs, *more, "latency=no", "ema=0.9")


def train_tinyllama(folder: Path) -> Path:
    """The toy, trained in a process of its own: this one must not compute before it forks."""
    pairs = [f"--set={pair}" for pair in [*toy_tinyllama(folder), "steps=20", "pairs="]]
    given = {pair.partition("=")[2].partition("=")[0]: pair for pair in pairs}
    base = folder / "model" / "base"
    command = [sys.executable, "-m", "edgekit", "train", "tinyllama", *given.values()]
    subprocess.run([*command, "--out", str(base)], check=True, capture_output=True, timeout=280)
    return base


@pytest.mark.slow
def test_kills_change_nothing_in_a_student(tmp_path: Path) -> None:
    base = train_tinyllama(tmp_path)
    pairs = (f"model={base}", f"text={tmp_path / 'prose.txt'}", "layers=0.5", "inner=0.5")
    more = ("length=64", "steps=40", "batch=8", "lr=3e-3", "held_tokens=1000", "threads=1")
    last = ("checkpoint_every=7", "latency=no", "precision=fp32")
    killed_at_random_points(tmp_path, 3, "distill-lm", *pairs, *more, *last)


@pytest.mark.slow
def test_kills_change_nothing_in_a_vision_transformer_s_many_runs(tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path / "pictures", each=40)
    data = (f"data={pictures}", f"start_data={pictures}", "start_steps=30", "width=32", "layers=2")
    more = ("patch=8", "examples=48", "seeds=1", "rates=1e-3,1e-2", "steps=20", "batch=16")
    last = ("threads=1", "latency=no", "checkpoint_every=7")
    killed_at_random_points(tmp_path, 3, "finetune-vit", *data, *more, *last)


@pytest.mark.slow
def test_three_kills_in_any_phase_of_vit_qat_change_nothing(tmp_path: Path) -> None:
    pictures = picture_folder(tmp_path / "pictures", each=40)
    size = ("side=8", "channels=1", "patch=2", "width=32", "depth=1", "heads=2", "hidden=64")
    more = ("steps=60", "tune_steps=60", "batch=16", "calibration=32", "checkpoint_every=7")
    last = ("eval_every=20", "formats=w4a4,w3a3", "threads=1", "latency=no")
    killed_at_random_points(tmp_path, 3, "vit-qat", f"data={pictures}", *size, *more, *last)


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


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OTHERS)
def test_three_kills_change_nothing_of_the_others(tmp_path: Path, recipe: str) -> None:
    digits = digit_folder(tmp_path / "digits")
    more = ("steps=60", "batch=16", "checkpoint_every=7", "eval_every=20", "threads=1")
    pairs = (f"data={digits}", *OTHERS[recipe], *more, "latency=no")
    killed_at_random_points(tmp_path, 3, recipe, *pairs)


@pytest.mark.slow
def test_kills_between_cuts_and_in_tuning_change_nothing(tmp_path: Path) -> None:
    toy = [pair for pair in toy_minimal(tmp_path) if not pair.startswith(("widths", "steps"))]
    more = ("widths=8,12", "steps=120", "tune_steps=80", "rounds=2", "chunk=2", "board=rpi5")
    killed_at_random_points(tmp_path, 6, "prune", *toy, *more, "held_images=8", "speedup=2")


@pytest.mark.slow
def test_kills_change_nothing_in_a_language_model_that_is_pruned(tmp_path: Path) -> None:
    base = train_tinyllama(tmp_path)
    pairs = (f"model={base}", f"text={tmp_path / 'prose.txt'}", "layers=0.5", "inner=0.5")
    more = ("methods=wanda,width,depth", "tune=yes", "steps=40", "batch=8", "lr=3e-3")
    last = ("length=64", "held_tokens=1000", "threads=1", "checkpoint_every=7", "latency=no")
    killed_at_random_points(tmp_path, 4, "prune-lm", *pairs, *more, *last, "precision=fp32")


@pytest.mark.slow
def test_kills_of_teacher_and_students_change_nothing(tmp_path: Path) -> None:
    toy = [pair for pair in toy_minimal(tmp_path) if not pair.startswith(("widths", "steps"))]
    more = ("widths=8,12", "teacher_steps=150", "steps=120", "held_images=8")
    more += ("features=1", "attention=1", "student_images=20")
    killed_at_random_points(tmp_path, 6, "distill", *toy, *more)


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    found = forks("spread", tmp_path)
    one = found.pop("one")
    for name, other in found.items():
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4), name
        assert other["state"] == pytest.approx(one["state"], rel=1e-3, abs=1e-4), name
    # A sharded run that was killed goes on as the one that was not.
    assert found["stopped"]["losses"] == found["shards"]["losses"]


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
