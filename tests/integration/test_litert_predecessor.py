"""Which of LiteRT and its predecessor runs a TFLite file, and what is said of the older one.

The real tflite-runtime needs numpy 1, so that it cannot be installed beside what edgekit's tests
need: here a package of its name and version hands on the engine that is installed. What the real
one computes is in docs/tflite.md, Running.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny_tflite

import edgekit

# Python's own start-up hook: what it finds of this name is nothing, as if it were not installed.
HIDE = """
    import sys

    class Nothing:
        def find_spec(name, path=None, target=None):
            if name == "ai_edge_litert":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Nothing)
"""
ENGINE = """
    import sys

    seen = [each for each in sys.meta_path if getattr(each, "__name__", "") != "Nothing"]
    sys.meta_path[:] = seen
    from ai_edge_litert.interpreter import Interpreter, OpResolverType
"""
PROGRAM = """
    import sys
    import numpy as np
    import edgekit
    from edgekit.errors import MissingExtraError

    try:
        with edgekit.load(sys.argv[1], n_threads=1) as session:
            pixels = np.ones((1, 3, 32, 32), np.float32)
            print("answers", *session.run({"pixels": pixels})["classes"].ravel())
        from edgekit.runtimes import litert
        print("engine", litert._engine())
    except MissingExtraError as error:
        print("missing", error.message, error.hint)
"""


def _predecessor(folder: Path) -> Path:
    """Install the stand-in for tflite-runtime 2.14.0."""
    package = folder / "tflite_runtime"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "interpreter.py").write_text(textwrap.dedent(ENGINE))
    facts = folder / "tflite_runtime-2.14.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: tflite-runtime\nVersion: 2.14.0\n"
    )
    return folder


def _hidden(folder: Path) -> Path:
    """Let no process find ai-edge-litert, children that try a file first among them."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(HIDE))
    return folder


def _run(model: Path, *paths: Path) -> tuple[dict[str, str], str]:
    """What the program says, by its first words, and what stands on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(model)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines()), done.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.tflite"
    path.write_bytes(tiny_tflite.dense("pixels", "classes"))
    return path


def test_the_newer_engine_is_taken_where_both_are_installed(model: Path, tmp_path: Path) -> None:
    said, stderr = _run(model, _predecessor(tmp_path / "old"))
    assert said["engine"].startswith("ai-edge-litert ")
    assert stderr == ""


def test_the_older_one_is_taken_where_it_is_what_is_installed_and_named(
    model: Path, tmp_path: Path
) -> None:
    said, stderr = _run(model, _hidden(tmp_path / "hidden"), _predecessor(tmp_path / "old"))
    assert said["engine"] == "tflite-runtime 2.14.0"
    (warning,) = stderr.splitlines()
    assert "tflite-runtime 2.14.0 is older than today's files" in warning
    assert "pip install ai-edge-litert" in warning and "edgekit verify --deep" in warning
    with edgekit.load(model, n_threads=1) as session:
        pixels = np.ones((1, 3, tiny_tflite.SIDE, tiny_tflite.SIDE), np.float32)
        expected = session.run({"pixels": pixels})["classes"].ravel()
    assert np.allclose([float(value) for value in said["answers"].split()], expected, atol=1e-5)


def test_a_file_that_passed_one_engine_is_tried_anew_in_the_other(
    model: Path, home: Path, tmp_path: Path
) -> None:
    paths = _hidden(tmp_path / "hidden"), _predecessor(tmp_path / "old")
    passed = home / "cache" / "first-load"
    _run(model)
    assert len(list(passed.iterdir())) == 1
    _run(model, *paths)
    assert len(list(passed.iterdir())) == 2


def test_without_either_the_extra_is_named(model: Path, tmp_path: Path) -> None:
    said, _ = _run(model, _hidden(tmp_path / "hidden"))
    assert "ai-edge-litert" in said["missing"] and "edgekit-deploy[tflite]" in said["missing"]
