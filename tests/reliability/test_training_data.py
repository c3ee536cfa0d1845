"""`edgekit train` with data that are broken, empty, tiny or wrongly labelled, and with a full disk.

Each ends in one clear line and its exit code, and leaves nothing but a good checkpoint.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from training_data import digit_folder, picture_folder, prose

from edgekit.training import checkpoint

FORKS = Path(__file__).resolve().parents[1] / "training_forks.py"
MINIMAL = ("side=8", "channels=1", "widths=10,20", "blocks=1,1", "flip=no", "shift=0")
RESIDUAL = ("side=8", "channels=1", "widths=8,12", "blocks=1,1", "flip=no", "shift=0")
# Toys of all recipes that learn from images.
IMAGES = {
    "minimal": MINIMAL,
    "vit-qat": (
        *("side=8", "channels=1", "patch=2", "width=32", "depth=1", "heads=2", "hidden=64"),
        *("tune_steps=6", "calibration=32", "formats=w4a4"),
    ),
    "finetune-vit": (
        *("start_steps=6", "width=32", "layers=2", "patch=8", "examples=48", "seeds=1"),
        *("rates=1e-2", "methods=linear"),
    ),
    "prune": (
        *RESIDUAL,
        *("tune_steps=6", "rounds=1", "chunk=2", "board=rpi5", "held_images=8", "speedup=2"),
    ),
    "distill": (*RESIDUAL, "teacher_steps=6", "held_images=8"),
    "nas": ("side=8", "channels=1", "hours=0.001"),
    "video": ("frames=4", "side=16", "widths=8,16", "part=4", "clips=300", "test_clips=100"),
    "dual-encoder": (
        *("side=16", "width=32", "depth=1", "text_depth=1", "heads=2", "space=16"),
        *("scenes=500", "test_scenes=100"),
    ),
    "diffusion": (
        *("side=12", "widths=16,16", "blocks=1", "generate=3", "judged=100", "judge_steps=40"),
    ),
}
# What is wrong with a folder of images, and the words that say so.
FOLDERS = {
    "truncated": "data/truncated/lying/003.png is no image that can be read",
    "no-jpeg": "data/no-jpeg/lying/a.jpg is no image that can be read",
    "no-images": "the class 'slanted' has 0 images to train on",
    "one-class": "data/one-class has 1 folders of images",
    "empty": "data/empty has 0 folders of images",
    "label": "classes that data/label/train has not: 'sitting'",
    "missing": "there are no data 'data/missing'",
}
OF_ALL = ("truncated", "empty")  # of each recipe; the rest of one, for all read by the same code
TEXTS = {
    "none.txt": "0 blocks of 2000 characters",
    "tiny.txt": "1 blocks of 2000 characters",
    "latin.txt": "is not UTF-8 at byte 3",
    "nowhere.txt": "there is no text",
}
PAIRS = {
    "keys.jsonl": "line 2 has no texts prompt and answer",
    "half.jsonl": "line 2 is not JSON",
    "few.jsonl": "few.jsonl has 3 pairs",
    "none.jsonl": "none.jsonl has 0 pairs",
    "nowhere.jsonl": "cannot read data/nowhere.jsonl",
}
BASE = "runs/tinyllama-base"
LLAMA = ("text=data/prose.txt", "size=toy", "length=64", "n_ctx=64", "ngram=no")
LLAMA += ("held_tokens=1000",)
CUT = (f"model={BASE}", "length=64", "held_tokens=1000")
LAST = ("steps=6", "batch=16", "threads=1", "latency=no")


class Case(NamedTuple):
    """A command, and what it has to say. ``checkpoints``: after so many the disk is full."""

    name: str
    recipe: str
    pairs: tuple[str, ...]
    words: str
    code: int = 10
    checkpoints: int | None = None
    resume: bool = False

    def to_dict(self) -> dict[str, Any]:
        pairs = {pair.partition("=")[0]: pair for pair in (*LAST, *self.pairs)}
        sets = [part for pair in pairs.values() for part in ("--set", pair)]
        out = ["--out", f"runs/{self.recipe}-{self.name}", *(["--resume"] * self.resume)]
        found: dict[str, Any] = {"arguments": ["train", self.recipe, *sets, *out]}
        return found if self.checkpoints is None else found | {"checkpoints": self.checkpoints}


def of_images(recipe: str, name: str, words: str) -> Case:
    start = (f"start_data=data/{name}",) if recipe == "finetune-vit" else ()
    return Case(name, recipe, (*IMAGES[recipe], f"data=data/{name}", *start), words)


GOOD = (*MINIMAL, "data=data/good", "steps=8", "checkpoint_every=1")
BROKEN = [
    *(
        of_images(recipe, name, words)
        for name, words in FOLDERS.items()
        for recipe in (IMAGES if name in OF_ALL else ("minimal",))
    ),
    # The first model of two must not be trained for data that turn out to be bad.
    Case(
        *("second", "finetune-vit"),
        (*IMAGES["finetune-vit"], "start_data=data/good", "data=data/truncated"),
        words="data/truncated/lying/003.png is no image",
    ),
    *(
        Case(name, "tinyllama", (*LLAMA, f"text=data/{name}"), words)
        for name, words in TEXTS.items()
    ),
    *(
        Case("none.txt", recipe, (*CUT, "text=data/none.txt"), TEXTS["none.txt"])
        for recipe in ("distill-lm", "prune-lm")
    ),
    *(
        Case(name, "finetune", (f"model={BASE}", f"data=data/{name}"), words)
        for name, words in PAIRS.items()
    ),
    Case(
        *("preferences", "finetune"),
        (f"model={BASE}", "data=data/pairs.jsonl", "teach=preferences"),
        words="line 1 has no texts prompt and chosen and rejected",
    ),
    Case("pairs", "tinyllama", (*LLAMA, "pairs=data/keys.jsonl"), PAIRS["keys.jsonl"]),
]
ENDING = [
    Case("nan", "minimal", (*GOOD, "lr=1e30", "clip=0", "warmup=0", "log_every=1"), "at step"),
    Case("full", "minimal", GOOD, "MB free, the work needs", code=6, checkpoints=3),
    Case("full", "minimal", GOOD, "", code=0, resume=True),
]
MADE = Case("base", "tinyllama", (*LLAMA, "pairs=", "steps=2"), "", code=0)
TINY = [of_images(recipe, "tiny-digits", "") for recipe in IMAGES if recipe != "nas"]
TINY += [of_images("minimal", "tiny", ""), of_images("video", "tiny", "")]
REFUSED = [
    of_images("nas", "tiny", "of 5 images"),
    of_images("prune", "tiny", "of 5 images 8 cannot be held back"),
    of_images("finetune-vit", "tiny", "5 examples are too few"),
    of_images("dual-encoder", "tiny", "data/tiny has 2 classes, the digits are 10"),
    of_images("diffusion", "tiny", "data/tiny has one image to judge by"),
]


def make_data(folder: Path) -> None:
    """All the folders and files of the cases, below ``folder``."""

    def pictures(name: str, each: int = 30) -> Path:
        return picture_folder(folder / name, each=each)

    pictures("good")
    pictures("tiny", each=3)
    digit_folder(folder / "tiny-digits", each=3)
    cut = pictures("truncated") / "lying" / "003.png"
    cut.write_bytes(cut.read_bytes()[:60])
    (pictures("no-jpeg") / "lying" / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00no")
    (pictures("no-images") / "slanted").mkdir()
    shutil.rmtree(pictures("one-class") / "lying")
    (folder / "empty").mkdir()
    for part in ("train", "test"):
        pictures(f"label/{part}")
    (folder / "label" / "test" / "lying").rename(folder / "label" / "test" / "sitting")
    (folder / "prose.txt").write_text(prose())
    (folder / "none.txt").touch()
    (folder / "tiny.txt").write_text("A cat sat.\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n" * 90_000)
    good = json.dumps({"prompt": "What?", "answer": "That."})
    bodies = {
        "pairs": [good] * 80,
        "keys": [good, json.dumps({"question": "What?", "answer": "That."}), *[good] * 80],
        "half": [good, good[:12]],
        "few": [good] * 3,
        "none": [],
    }
    for name, lines in bodies.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def ran(place: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """How the commands of ``cases`` ended, one after the other, of one program's forks."""
    make_data(place / "data")
    done = subprocess.run(
        [sys.executable, FORKS, "commands", place],
        input=json.dumps([case.to_dict() for case in cases]),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


class Ends(NamedTuple):
    place: Path
    of: dict[Case, dict[str, Any]]


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    place = tmp_path_factory.mktemp("runs")
    cases = [MADE, *BROKEN, *ENDING]
    found = dict(zip(cases, ran(place, cases), strict=True))
    assert found[MADE]["code"] == 0, found[MADE]["stderr"]
    return Ends(place, found)


def said(end: dict[str, Any], case: Case) -> None:
    """That a command failed in one clear line, with a word on what to do."""
    assert end["code"] == case.code, end["stderr"]
    assert "Traceback" not in end["stderr"] and end["stdout"] == ""
    lines = end["stderr"].splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and case.words in errors[0] and len(errors[0]) < 300
    assert lines[-1].startswith("hint: ")


def named(case: Case) -> str:
    return f"{case.recipe}-{case.name}"


@pytest.mark.parametrize("case", BROKEN, ids=named)
def test_bad_data_end_in_one_line_and_leave_nothing(ends: Ends, case: Case) -> None:
    said(ends.of[case], case)
    left = {path.name for path in (ends.place / "runs").iterdir() if not path.name.startswith(".")}
    assert not [name for name in left if name.startswith(named(case))]


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(ends: Ends) -> None:
    case = ENDING[0]
    said(ends.of[case], case)
    (path,) = (ends.place / "runs" / "minimal-nan.training").rglob("checkpoint.safetensors")
    tensors, body = checkpoint.read(path)
    assert 1 <= body["step"] < 8
    assert all(bool(each.isfinite().all()) for each in tensors.values() if each.is_floating_point())


def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on(ends: Ends) -> None:
    full, again = ENDING[1:]
    said(ends.of[full], full)
    assert ends.of[again]["code"] == 0, ends.of[again]["stderr"]
    body = json.loads((ends.place / "runs" / "minimal-full" / "training.json").read_text())
    assert body["phases"][0]["steps"] == 8


@pytest.mark.slow
def test_tiny_data_are_learned_from_or_refused(tmp_path: Path) -> None:
    cases = [*TINY, *REFUSED]
    for case, end in zip(cases, ran(tmp_path, cases), strict=True):
        if case in REFUSED:
            said(end, case)
        else:
            assert end["code"] == 0, (case, end["stderr"][-2000:])
            assert (tmp_path / "runs" / named(case) / "training.json").is_file()
