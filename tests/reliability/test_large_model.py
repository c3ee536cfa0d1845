"""A model of TinyLlama's size fits a small machine: 1.1 B parameters within 6 GiB."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from large_llama import make

from edgekit.artifact import Artifact


def peak_rss_bytes(command: list[str]) -> int:
    """Run a command; the most memory that it and its children held at one moment."""
    process = psutil.Popen(command)
    peak = 0
    while process.poll() is None:
        held = 0
        try:
            for one in [process, *process.children(recursive=True)]:
                held += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
        peak = max(peak, held)
        time.sleep(0.05)
    assert process.returncode == 0
    return peak


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_1_1_billion_parameters_export_within_6_gib(tmp_path: Path) -> None:
    model = make(tmp_path / "tinyllama")
    out = tmp_path / "q4"
    edgekit = [sys.executable, "-m", "edgekit"]
    options = ["--chunks", "2", "--no-receipt", "--out", str(out)]
    peak = peak_rss_bytes([*edgekit, "export", str(model), *options])
    print(f"peak RSS {peak / 2**30:.2f} GiB")
    assert peak < 6 << 30
    artifact = Artifact.open(out)
    artifact.verify()
    assert artifact.manifest.details["parameters"] == 1_100_048_384
    assert artifact.manifest.recipe.type == "Q4_K_M"
    ran = subprocess.run([*edgekit, "run", str(out), "Hello", "--max-tokens", "4"])
    assert ran.returncode == 0
