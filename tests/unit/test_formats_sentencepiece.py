"""The SentencePiece model reader, checked against the sentencepiece package on trained models."""

from __future__ import annotations

import io
import random
import time
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from edgekit.errors import CorruptArtifactError, EdgekitError, SourceError
from edgekit.formats import sentencepiece as reader

SENTENCES = [f"the {n} quick brown foxes jump over {n * 7} lazy dogs, größer" for n in range(200)]


def _train(**options: Any) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=out, minloglevel=2, **options
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {
        "unigram": _train(vocab_size=60, model_type="unigram"),
        "bpe": _train(
            vocab_size=340,
            model_type="bpe",
            byte_fallback=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            pad_id=3,
            user_defined_symbols=["<sep>"],
            control_symbols=["<mask>"],
        ),
        "char": _train(vocab_size=40, model_type="char", bos_id=-1),
    }


@pytest.mark.parametrize("name", ["unigram", "bpe", "char"])
def test_a_trained_model_reads_as_the_sentencepiece_package_reads_it(
    name: str, models: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(models[name])
    model = reader.read(path)
    processor = sentencepiece.SentencePieceProcessor(model_proto=models[name])
    ids = range(processor.get_piece_size())
    assert [piece for piece, _, _ in model.pieces] == [processor.id_to_piece(i) for i in ids]
    assert [score for _, score, _ in model.pieces] == [processor.get_score(i) for i in ids]
    for index, (_, _, kind) in enumerate(model.pieces):
        assert (kind == reader.UNKNOWN) == processor.is_unknown(index)
        assert (kind == reader.CONTROL) == processor.is_control(index)
        assert (kind == reader.BYTE) == processor.is_byte(index)
        assert (kind == reader.UNUSED) == processor.is_unused(index)
    assert (model.unk_id, model.bos_id, model.eos_id, model.pad_id) == (
        processor.unk_id(),
        processor.bos_id(),
        processor.eos_id(),
        processor.pad_id(),
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(models[name])
    assert model.model_type == name
    assert model.add_dummy_prefix == proto.normalizer_spec.add_dummy_prefix
    assert model.remove_extra_whitespaces == proto.normalizer_spec.remove_extra_whitespaces
    assert model.precompiled_charsmap == proto.normalizer_spec.precompiled_charsmap
    assert model.byte_fallback == proto.trainer_spec.byte_fallback


def test_user_defined_pieces_are_known(models: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(models["bpe"])
    kinds = {piece: kind for piece, _, kind in reader.read(path).pieces}
    assert kinds["<sep>"] == reader.USER_DEFINED
    assert kinds["<mask>"] == reader.CONTROL


def test_every_mutant_is_read_or_refused_within_a_second(
    models: dict[str, bytes], tmp_path: Path
) -> None:
    rng = random.Random(0)
    path = tmp_path / "tokenizer.model"
    refused = 0
    for _ in range(500):
        raw = bytearray(models["bpe"])
        for _ in range(rng.choice((1, 4, 30))):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw[: rng.choice((len(raw), rng.randrange(len(raw))))])
        start = time.process_time()
        try:
            reader.read(path)
        except EdgekitError:
            refused += 1
        assert time.process_time() - start < 1
    assert refused > 250


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "no pieces"),
        (b"\x0a\xff\xff\xff\xff\x0f", "0 left"),
        (b"\xff" * 20, "without an end"),
        (b"\x0a", "without an end"),
        (b"\x08\x01", "number where bytes belong"),
        (b"\x48\x01", "no pieces"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\x03\x0a\x01\xff", "not UTF-8"),
        (b"\x0a\x02\x18\x09", "unknown type 9"),
        (b"\x0a\x02\x10\x01", "number where bytes belong"),
        (b"\x0a\x03\x0a\x01a\x12\x03\xc8\x02\x64", "special id"),
    ],
)
def test_a_malformed_model_is_refused(raw: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(raw)
    with pytest.raises(CorruptArtifactError, match=says) as caught:
        reader.read(path)
    assert caught.value.message.startswith("tokenizer.model is not a SentencePiece model: ")


def test_what_is_not_a_file_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        reader.read(tmp_path)
