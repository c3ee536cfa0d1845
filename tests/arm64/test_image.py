"""The image that scripts/build arm64 made answers and measures under emulation, and is small."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgekit

IMAGE = "localhost/edgekit:arm64"
MAX_BYTES = 400_000_000


@pytest.fixture(scope="module")
def box() -> Iterator[str]:
    """A container of the image that scripts/build arm64 made."""
    os.environ.setdefault("STORAGE_DRIVER", "overlay")
    buildah = shutil.which("buildah")
    if not buildah or subprocess.run([buildah, "inspect", IMAGE], capture_output=True).returncode:
        pytest.skip("there is no image: run scripts/build arm64")
    made = subprocess.run(
        [buildah, "from", "--pull-never", IMAGE], capture_output=True, text=True, check=True
    ).stdout.strip()
    yield made
    subprocess.run([buildah, "rm", made], capture_output=True, check=True)


def _edgekit(box: str, *words: str, mount: Path | None = None) -> str:
    volume = ["--volume", f"{mount}:/models:ro"] if mount else []
    argv = ["buildah", "run", "--isolation", "chroot", "--env", "QEMU_CPU=cortex-a76", *volume]
    done = subprocess.run([*argv, box, "--", "edgekit", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.arm64
@pytest.mark.timeout(1200)
def test_the_image_answers_and_measures(box: str, smollm2_gguf: Path) -> None:
    models, name = smollm2_gguf.parent, f"/models/{smollm2_gguf.name}"
    engine = json.loads(_edgekit(box, "doctor", "--json"))["engine"]
    assert (engine["backend"], engine["problem"]) == ("armv8.2_2", None)
    words = ("run", name, "The capital of France is", "--raw", "--max-tokens", "4")
    assert "Paris" in _edgekit(box, *words, "--temperature", "0", "--threads", "1", mount=models)
    words = ("bench", name, "-t", "1", "-p", "4", "-n", "2", "-r", "1")
    report = json.loads(_edgekit(box, *words, "--no-session", "--no-probe", "--json", mount=models))
    assert report["rows"]


@pytest.mark.arm64
def test_the_image_holds_this_code_and_not_that_of_an_earlier_build(box: str) -> None:
    place = subprocess.run(["buildah", "mount", box], capture_output=True, text=True, check=True)
    (package,) = Path(place.stdout.strip()).glob("opt/edgekit/lib/python3*/site-packages/edgekit")
    tree = Path(edgekit.__file__).parent
    ours = {path.relative_to(tree): path.read_bytes() for path in tree.rglob("*.py")}
    assert ours
    assert {path: (package / path).read_bytes() for path in ours} == ours


@pytest.mark.arm64
def test_the_image_is_small_and_holds_no_torch_and_no_compiler(box: str) -> None:
    place = subprocess.run(["buildah", "mount", box], capture_output=True, text=True, check=True)
    root = Path(place.stdout.strip())
    sizes = [path.lstat() for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    files = {status.st_ino: status.st_size for status in sizes}
    assert sum(files.values()) <= MAX_BYTES
    assert not list(root.glob("opt/edgekit/lib/python3*/site-packages/torch"))
    assert not (root / "usr/bin/gcc").exists() and not (root / "usr/bin/cc").exists()
