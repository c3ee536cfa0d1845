"""`edgekit export --format gguf` on the real SmolLM2: what it makes, says, repeats and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit import export_again, exporter
from edgekit.artifact import Artifact
from edgekit.errors import ExportError, RecipeError, UsageError
from edgekit.formats import gguf

TEXT = " ".join(f"The number {n} follows {n - 1} and is half of {2 * n}." for n in range(1, 400))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.txt"
    path.write_text(TEXT)
    return path


def test_the_default_is_4_bits_with_an_importance_matrix(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    ran = cli(
        "export", "smollm2-135m", "--bits", "4", "--chunks", "2", "--no-receipt", "--out", "q4"
    )
    assert ran.code == 0, ran.stderr
    assert "already quantized (Q4_1)" in ran.stderr
    for words in ("Q4_K_M", "re-quantized from", "166 tensors Q4_K -> Q5_0", "builtin, 2 chunks"):
        assert words in ran.stdout
    artifact = Artifact.open(tmp_path / "q4")
    artifact.verify()
    assert artifact.manifest.details["requantized_from"] == "Q4_1"
    assert artifact.manifest.receipt == {"status": "unproven"}
    header = gguf.read(artifact.model_path)
    assert header.types()["Q4_K"] == 16
    assert {file.role for file in artifact.manifest.files} == {"model", "imatrix"}


def test_an_export_is_repeated_byte_for_byte(
    cli: Callable[..., Any], tmp_path: Path, text: Path
) -> None:
    options = ["--type", "Q3_K_M", "--calibration", text, "--chunks", "2"]
    options += ["--override", "ffn_down=Q8_0", "--override", "blk\\.0\\.=Q6_K", "--no-receipt"]
    assert cli("export", "smollm2-135m", *options, "--out", "one").code == 0
    home = tmp_path / "another-home"  # so that the importance matrix is computed again
    ran = cli("export", "smollm2-135m", *options, "--out", "two", EDGEKIT_HOME=str(home))
    assert ran.code == 0
    ran = cli("export", "--from-manifest", "one", "--calibration", text, "--out", "three")
    assert ran.code == 0, ran.stderr
    for name in ("manifest.json", "model.gguf", "imatrix.gguf"):
        first = (tmp_path / "one" / name).read_bytes()
        assert (tmp_path / "two" / name).read_bytes() == first
        assert (tmp_path / "three" / name).read_bytes() == first
    tensors = gguf.read(tmp_path / "one" / "model.gguf")
    assert tensors.tensor("blk.1.ffn_down.weight").type == "Q8_0"

    ran = cli("export", "--from-manifest", "one", "--bits", "3", "--out", "four")
    assert ran.code == 2 and "takes the whole recipe" in ran.stderr
    text.write_text(TEXT + "!")
    ran = cli("export", "--from-manifest", "one", "--calibration", text, "--out", "four")
    assert ran.code == 2 and "do not repeat the earlier export" in ran.stderr
    assert not (tmp_path / "four").exists()


def test_an_export_that_gives_other_bytes_is_no_repeat(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    assert cli("export", "smollm2-135m", "--type", "Q8_0", "--no-receipt", "--out", "one").code == 0
    earlier = Artifact.open(tmp_path / "one").manifest
    file = replace(earlier.files[0], sha256="00" * 32)
    old = replace(earlier, files=(file,), versions=earlier.versions | {"llama-cpp-python": "0.1"})
    (tmp_path / "one" / "manifest.json").write_bytes(old.to_bytes())
    ran = cli("export", "--from-manifest", "one", "--out", "two")
    assert ran.code == 6 and "gave other bytes: llama-cpp-python was 0.1, is" in ran.stderr
    assert not (tmp_path / "two").exists()


def test_a_dry_run_foretells_the_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    options = ["smollm2-135m", "--type", "Q5_K_M", "--calibration", "none"]
    ran = cli("export", *options, "--dry-run", "--json", "--out", "q5")
    assert ran.code == 0 and not (tmp_path / "q5").exists()
    plan = json.loads(ran.stdout)
    assert any("importance matrix" in warning for warning in plan["warnings"])
    assert cli("export", *options, "--no-receipt", "--out", "q5").code == 0
    header = gguf.read(tmp_path / "q5" / "model.gguf")
    assert plan["size_bytes"] == pytest.approx(header.file_size, rel=1e-4)
    assert plan["bits_per_weight"] == pytest.approx(header.bits_per_weight)
    assert {t["name"]: t["type"] for t in plan["tensors"]} == {
        t.name: t.type for t in header.tensors
    }
    fallbacks = [t for t in plan["tensors"] if t["type"] != t["wanted"]]
    assert len(fallbacks) == 180
    listed = Artifact.open(tmp_path / "q5").manifest.details["fallbacks"]
    assert {row["tensor"] for row in listed} == {t["name"] for t in fallbacks}


@pytest.mark.slow
def test_the_importance_matrix_is_computed_once(tmp_path: Path, text: Path) -> None:
    def export(kind: str) -> list[str]:
        stages: list[str] = []
        exporter.export(
            "smollm2-135m",
            out=tmp_path / kind,
            type=kind,
            calibration=text,
            chunks=2,
            receipt=False,
            progress=lambda stage, done, total: stages.append(stage),
        )
        return stages

    assert "importance matrix" in export("Q4_0")
    assert "importance matrix" not in export("Q4_1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 7}, "no default for 7 bits"),
        ({"bits": 4, "type": "Q4_0"}, "not both"),
        ({"type": "Q4_K_X"}, "unknown GGUF type"),
        ({"type": "IQ2_XXS", "calibration": "none"}, "needs an importance matrix"),
        ({"type": "F16", "calibration": "builtin"}, "is not quantized"),
        ({"type": "Q8_0", "chunks": 4}, "no chunks to count"),
        ({"type": "Q4_0", "calibration": "/no/such/file"}, "cannot read the calibration text"),
        ({"type": "Q4_0", "overrides": (("nothing", "Q8_0"),)}, "matches no tensor"),
        ({"type": "Q4_0", "overrides": (("ffn_down", "Q9"),)}, "unknown tensor type"),
        ({"type": "Q4_0", "adapter": Path(".")}, "Hugging Face folder"),
        ({"typo": 1}, "unexpected keyword argument 'typo'"),
    ],
)
def test_bad_options_are_one_clear_error(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        exporter.export("smollm2-135m", out=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_text_too_short_to_calibrate_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ExportError, match="not even 1024"):
        exporter.export("smollm2-135m", out=tmp_path / "o", calibration=tmp_path / "short.txt")
    assert not (tmp_path / "o").exists()


def test_a_strangers_folder_is_no_place_for_the_output(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match="was not made by edgekit"):
        exporter.export("smollm2-135m", out=tmp_path / "mine", type="Q8_0")


def test_an_export_on_top_of_an_artifact_replaces_it(tmp_path: Path) -> None:
    for kind in ("Q8_0", "Q4_0"):
        exporter.export(
            "smollm2-135m", out=tmp_path / "out", type=kind, calibration="none", receipt=False
        )
    assert Artifact.open(tmp_path / "out").manifest.recipe.type == "Q4_0"
    with pytest.raises(RecipeError, match="do not repeat"):
        export_again.repeat(tmp_path / "out", out=tmp_path / "again", calibration="builtin")
