"""What the image promises can be read from its Dockerfile; that it runs is tested with arm64."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "Dockerfile.arm64"


def _stage(name: str) -> str:
    stages = re.split(r"^(?=FROM )", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return next(stage for stage in stages if re.match(rf"FROM \S.* AS {name}\n", stage))


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint, "scripts/setup test installs it"
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_base_is_pinned_by_its_digest() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"^ARG BASE=\S+:\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    stages = re.findall(r"^FROM (?:--platform=\S+ )?(\S+) AS (\S+)", text, re.MULTILINE)
    assert len(stages) == len(re.findall(r"^FROM ", text, re.MULTILINE))
    earlier = {"${BASE}", "${BUILD_BASE}", "scratch"}
    for base, name in stages:
        assert base in earlier
        earlier.add(name)
    assert "ARG BUILD_BASE=${BASE}" in text


def test_the_image_runs_edgekit_as_nobody_special_and_knows_when_it_is_healthy() -> None:
    runtime = _stage("runtime")
    assert 'ENTRYPOINT ["edgekit"]' in runtime
    assert re.search(r"^USER (?!0$)\d+$", runtime, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK .*CMD ", runtime, re.MULTILINE)


def test_nothing_is_compiled_or_fetched_by_pip_in_the_runtime() -> None:
    runtime = _stage("runtime")
    assert "torch" not in runtime and "g++" not in runtime
    assert all("--no-index" in line for line in re.findall(r"pip install.*", runtime))


def test_every_fetched_package_is_pinned_to_a_version_and_its_hashes() -> None:
    text = (ROOT / "scripts/wheelhouse.txt").read_text()
    rows = re.sub(r"#.*", "", text).replace("\\\n", " ").split("\n")
    packages = [row.split() for row in rows if row.strip()]
    assert {words[0].partition("==")[0] for words in packages} >= {"numpy", "pip", "pyyaml"}
    for name, *hashes in packages:
        assert re.fullmatch(r"[a-z0-9-]+==[\d.]+", name), name
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h) for h in hashes), name
