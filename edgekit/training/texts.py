"""Texts to train on: read and cut, tokenized once into a file, memory-mapped, packed to one length.

Knows files, tokens and pairs of question and answer; never a model.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgekit import _fs
from edgekit.errors import DataError
from edgekit.formats import json_file
from edgekit.formats.foreign import Malformed
from edgekit.training import arrow_folder
from edgekit.training.trainer import Batch

END, USER, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (END, USER, TURN_END)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_BLOCK_CHARS = 2000
_HELD_EVERY = 40  # blocks: each fortieth is never trained on
_LONGEST_LINE = 20_000  # characters: a longer one is cut
_AT_ONCE = 512  # blocks that are tokenized together
_IGNORED = -100


@dataclass(frozen=True)
class Texts:
    """Blocks of some 2,000 characters, cut between lines."""

    train: list[str]
    held: list[str]


def read(spec: str) -> Texts:
    """``spec`` is a UTF-8 text, a folder of ``*.txt``, a data set of Hugging Face with a column
    "text" (of which the part "train" is read), or the name of a folder in the cache, as
    ``benchmarks/train/fetch`` makes them ("prose"). Raises DataError.
    """
    path = Path(spec).expanduser()
    if not path.exists() and spec.isidentifier():
        path = _fs.home("cache") / "data" / spec
    if arrow_folder.is_one(path):
        rows, _ = arrow_folder.halves(path)
        return _parted(spec, list(_cut("\n".join(rows.texts("text")))))
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(
            f"there is no text {spec!r:.80}",
            hint="a .txt file, a folder of them, or prose, which benchmarks/train/fetch gets",
        )
    return _parted(spec, [block for file in files for block in _blocks(file)])


def _parted(spec: str, blocks: list[str]) -> Texts:
    held = blocks[_HELD_EVERY - 1 :: _HELD_EVERY]
    train = [b for n, b in enumerate(blocks) if n % _HELD_EVERY != _HELD_EVERY - 1]
    if not held:
        raise DataError(
            f"{spec} has {len(blocks)} blocks of {_BLOCK_CHARS} characters",
            hint=f"at least {_HELD_EVERY}: one is held out to judge by",
        )
    return Texts(train, held)


def _blocks(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors of Windows begin with a mark
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 at byte {error.start}", hint="convert it") from None
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    yield from _cut(text)


def _cut(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        far = start + _LONGEST_LINE
        end = text.find("\n", start + _BLOCK_CHARS, far)
        if end < 0 and far < len(text):  # a line without an end: between words, or anywhere
            end = text.find(" ", start + _BLOCK_CHARS, far)
            end = far - 1 if end < 0 else end
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end


def byte_pairs(blocks: Sequence[str], size: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016, algorithm 1; on bytes: Radford et al. 2019, section
    2.2) of ``size`` entries, the special ones first; words are split as in GPT-2.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(blocks, trainer, length=len(blocks))
    if tokenizer.get_vocab_size() < size:
        raise DataError(
            f"the text gives only {tokenizer.get_vocab_size()} tokens, not {size}",
            hint="more text, or a smaller size",
        )
    return tokenizer


def pack(tokenizer: Tokenizer, blocks: Sequence[str], path: Path) -> None:
    """Write the tokens of all ``blocks``, an end after each, as uint16 or uint32.

    Raises OutOfSpaceError, as soon as the first blocks tell how much room the others will take.
    """
    # Written and not mapped: where a mapped file finds no room, the process dies of a SIGBUS.
    _fs.write_pieces(path, _tokens(tokenizer, blocks, path))


def _tokens(tokenizer: Tokenizer, blocks: Sequence[str], path: Path) -> Iterator[bytes]:
    end, kind = tokenizer.token_to_id(END), _kind(tokenizer)
    whole = sum(map(len, blocks))
    for start in range(0, len(blocks), _AT_ONCE):
        some = blocks[start : start + _AT_ONCE]
        found = [*(id for each in tokenizer.encode_batch(some) for id in (*each.ids, end))]
        if not start:
            size_bytes = len(found) * kind().itemsize
            _fs.require_space(path, size_bytes * whole // max(1, sum(map(len, some))))
        yield np.array(found, kind).tobytes()


def _kind(tokenizer: Tokenizer) -> Any:
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32


def tokens_of(tokenizer: Tokenizer, path: Path) -> np.ndarray[Any, Any]:
    """What ``pack`` wrote, mapped and not loaded."""
    return np.memmap(path, dtype=_kind(tokenizer), mode="r")


class Packed:
    """Pieces of ``length`` tokens and those that follow each: data for the trainer."""

    def __init__(self, tokens: np.ndarray[Any, Any], length: int) -> None:
        self.tokens, self.length = tokens, length
        if len(tokens) <= length:
            raise DataError(
                f"{len(tokens)} tokens are no piece of {length}", hint="more text, a smaller length"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def batch(self, numbers: torch.Tensor) -> Batch:
        starts = numbers.numpy()[:, None] * self.length
        found = self.tokens[starts + np.arange(self.length + 1)].astype(np.int64)
        pieces = torch.from_numpy(found)
        return pieces[:, :-1], pieces[:, 1:]


def spread(tokens: np.ndarray[Any, Any], count: int, piece: int) -> np.ndarray[Any, Any]:
    """At most ``count`` of ``tokens``, in pieces that lie evenly over all of them."""
    if len(tokens) <= count:
        return np.asarray(tokens)
    piece = min(piece, count)
    starts = np.linspace(0, len(tokens) - piece, count // piece).astype(np.int64)
    return np.concatenate([tokens[start : start + piece] for start in starts])


def windows(tokens: np.ndarray[Any, Any], length: int) -> Batch:
    """``tokens`` as pieces of ``length`` that overlap by half, to judge a model by: each token but
    the first is a target once, and all but the first ``length`` of them have at least half a piece
    before them. Ids and targets, int64 [pieces, length]; what is no target is -100.
    """
    count, stride = len(tokens) - 1, max(1, length // 2)
    pieces = 1 + max(0, -(-(count - length) // stride))
    ids = torch.zeros((pieces, length), dtype=torch.int64)
    targets = torch.full_like(ids, _IGNORED)
    for number in range(pieces):
        start = number * stride
        found = torch.from_numpy(tokens[start : start + length + 1].astype(np.int64))
        known = length - stride if number else 0  # judged by the piece before
        ids[number, : len(found) - 1] = found[:-1]
        targets[number, known : len(found) - 1] = found[known + 1 :]
    return ids, targets


# Questions and answers


@dataclass(frozen=True)
class Pair:
    """A question and its answer."""

    prompt: str
    answer: str


def pairs(path: Path, limit: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Train and held out, from JSON lines with texts "prompt" and "answer". Raises DataError."""
    train, held = json_lines(path, ("prompt", "answer"), limit)
    return [Pair(*each) for each in train], [Pair(*each) for each in held]


def json_lines(
    path: Path, keys: tuple[str, ...], limit: int = 0
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The texts that at most ``limit`` lines (all for 0) have at ``keys``, or rows of a data set of
    Hugging Face: to train on, and each fortieth, which is held out. Empty lines are none. Raises
    DataError.
    """
    if arrow_folder.is_one(path):
        rows, _ = arrow_folder.halves(path)
        columns = [rows.texts(key)[: limit or None] for key in keys]
        found = list(zip(*columns, strict=True))
    else:
        found = list(_lines(path, keys, limit))
    held = found[_HELD_EVERY - 1 :: _HELD_EVERY]
    if not held:
        raise DataError(f"{path} has {len(found)} pairs", hint=f"at least {_HELD_EVERY}")
    return [p for n, p in enumerate(found) if n % _HELD_EVERY != _HELD_EVERY - 1], held


def _lines(path: Path, keys: tuple[str, ...], limit: int) -> Iterator[tuple[str, ...]]:
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror}",
            hint="a file of JSON lines, or prose, which benchmarks/train/fetch gets",
        ) from None
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    for number, line in numbered[: limit or None]:
        try:
            body = json_file.parse(line)
            values = [body.get(key) if isinstance(body, dict) else None for key in keys]
            if not all(isinstance(value, str) and value for value in values):
                raise Malformed(f"has no texts {' and '.join(keys)}")
            yield tuple(map(str, values))
        except Malformed as error:
            raise DataError(
                f"{path}: line {number} {error}",
                hint=f"each line has {json.dumps(dict.fromkeys(keys, '...'))}",
            ) from None


def named(spec: str, file: str) -> Path:
    """The path ``spec``, or ``file`` in the folder of that name in edgekit's cache."""
    path = Path(spec).expanduser()
    if not path.exists() and spec.isidentifier():
        path = _fs.home("cache") / "data" / spec / file
    return path


Chat = tuple[list[int], list[int]]


def longest_first(found: Sequence[Chat]) -> list[Chat]:
    """So ordered that the memory that the first chats need is enough for all."""
    return sorted(found, key=lambda chat: -len(chat[0]) - len(chat[1]))


class Answers:
    """Chats of one question and one answer, as tokens, cut at ``length``; what is no answer has the
    target -100, so that the loss is on answers only (and on their ends). A batch is as wide as its
    longest chat.
    """

    def __init__(self, chats: Sequence[Chat], length: int, pad: int) -> None:
        self.ids = torch.full((len(chats), length + 1), pad)
        self.targets = torch.full((len(chats), length + 1), _IGNORED)
        self.lengths = torch.empty(len(chats), dtype=torch.int64)
        for row, (question, answer) in enumerate(chats):
            ids = [*question, *answer][: length + 1]
            self.ids[row, : len(ids)] = torch.tensor(ids)
            begin = len(question)
            self.targets[row, begin : len(ids)] = torch.tensor(ids[begin:], dtype=torch.int64)
            self.lengths[row] = len(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, numbers: torch.Tensor) -> Batch:
        # A process's share of a batch may be empty.
        wide = int(self.lengths[numbers].max()) if len(numbers) else 2
        return self.ids[numbers, : wide - 1], self.targets[numbers, 1:wide]


def chats(tokenizer: Tokenizer, found: Sequence[Pair]) -> list[Chat]:
    """The tokens of each question, up to where the answer begins, and of its answer with its end:
    as CHAT_TEMPLATE writes them.
    """
    asked = tokenizer.encode_batch(
        [f"{USER}user\n{p.prompt}{TURN_END}\n{USER}assistant\n" for p in found]
    )
    told = tokenizer.encode_batch([f"{p.answer}{TURN_END}" for p in found])
    return [(one.ids, other.ids) for one, other in zip(asked, told, strict=True)]


def terms(batch: Batch) -> torch.Tensor:
    """How many tokens of a batch have a target."""
    return (batch[1] != _IGNORED).sum()
