"""The float GGUF of every family is the one that llama.cpp's own conversion script writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_tokenizers

from edgekit.exporters import hf_to_gguf
from edgekit.formats import gguf
from edgekit.source import source

pytestmark = pytest.mark.slow

# F16 for every family; the other types once, for they differ in nothing but the last rounding.
CASES = [*((name, "F16") for name in tiny.MODELS), ("llama3", "F32"), ("llama3", "BF16")]

# One process converts everything: importing torch and transformers is most of the time.
DRIVER = """
import json, runpy, sys
script = sys.argv[1]
for folder, kind, out in json.loads(sys.argv[2]):
    sys.argv = [script, folder, "--outtype", kind, "--outfile", out]
    runpy.run_path(script, run_name="__main__")
"""

# Keys that differ on purpose, and why llama.cpp reads the same from both files.
NAMES_FOR_PEOPLE = {"general.name", "general.size_label"}  # from the folder's name; nobody computes
DEFAULTS = {
    "tokenizer.ggml.add_space_prefix": True
}  # what llama.cpp takes for "llama" vocabularies
SCORES = "tokenizer.ggml.scores"


@pytest.fixture(scope="module")
def reference(
    tiny_model: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Path]:
    """The file of the script for a model and a float type."""
    out = tmp_path_factory.mktemp("reference")
    script = tiny_tokenizers.llama_source() / "convert_hf_to_gguf.py"
    jobs = [
        (str(tiny_model(name)), kind.lower(), str(out / f"{name}-{kind}.gguf"))
        for name, kind in CASES
    ]
    subprocess.run(
        [sys.executable, "-c", DRIVER, str(script), json.dumps(jobs)],
        env=os.environ | {"PYTHONPATH": f"{script.parent / 'gguf-py'}:{script.parent}"},
        check=True,
        capture_output=True,
    )
    return lambda name, kind: out / f"{name}-{kind}.gguf"


def read_bits(path: Path, tensor: gguf.GgufTensor) -> bytes:
    with path.open("rb") as file:
        file.seek(tensor.offset)
        return file.read(tensor.size_bytes)


def read_by_llama_cpp(header: gguf.GgufHeader) -> dict[str, Any]:
    kept = {k: v for k, v in header.metadata.items() if k not in NAMES_FOR_PEOPLE}
    if header.metadata["tokenizer.ggml.model"] == "llama":
        kept = DEFAULTS | kept
    return kept


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_same_tensors_and_same_metadata(
    name: str,
    kind: str,
    tiny_model: Callable[[str], Path],
    reference: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    ours, theirs = tmp_path / "ours.gguf", reference(name, kind)
    hf_to_gguf.write(source(tiny_model(name)), ours, kind)
    found, expected = gguf.read(ours), gguf.read(theirs)

    metadata, wanted = read_by_llama_cpp(found), read_by_llama_cpp(expected)
    if name == "tinyllama":
        # Without tokenizer.model the script gives every piece the score -1000, with which llama.cpp
        # splits texts differently than the model's tokenizer does (test_gguf_parity).
        assert set(wanted.pop(SCORES)) == {-1000.0}
        metadata.pop(SCORES)
    assert metadata == wanted

    places = {tensor.name: tensor for tensor in expected.tensors}
    assert {tensor.name for tensor in found.tensors} == set(places)
    for tensor in found.tensors:
        other = places[tensor.name]
        assert (tensor.type, tensor.shape) == (other.type, other.shape), tensor.name
        assert read_bits(ours, tensor) == read_bits(theirs, other), tensor.name
