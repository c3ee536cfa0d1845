"""One model under test: its floats, its importance matrix, and what was measured on it so far.

Knows files and the cache, so that an interrupted run goes on where it was; never two models.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from edgekit import _fs, _proc, evaluate, quant
from edgekit.exporter import Progress
from edgekit.exporters import imatrix, quantizer
from edgekit.formats import gguf
from edgekit.intervals import Interval
from edgekit.llama_library import version
from edgekit.recipe import Calibration
from edgekit.registry import load
from edgekit.scorer import ModelFiles, memory_limit, model_files
from edgekit.sensitivity_report import InputRow, PartRow
from edgekit.source import ModelSource

_ALGORITHM = 1  # part of the cache key: raise it when the figures would change
_COUNT_TIMEOUT_S = 600
_STEPS = 100  # of progress, per file that is measured
_BLOCK = re.compile(r"blk\.(\d+)\.")
_KINDS = (
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    *("ffn_gate", "ffn_up", "ffn_down", "token_embd", "output"),
)


class Subject:
    """One model under test: its floats, its importance matrix, and what was measured on it."""

    def __init__(
        self,
        name: str,
        found: ModelSource,
        folder: Path,
        calibration: tuple[Calibration, bytes],
        n_ctx: int,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self.name = name
        self.source = found
        self._folder = folder
        self._calibration, self._calibration_text = calibration
        self._n_ctx = n_ctx
        self._threads = threads
        self._progress = progress

    def tell(self, stage: str, at: int, count: int, done: int, total: int) -> None:
        """Progress inside file ``at`` of ``count``: one bar for all of them."""
        share = _STEPS * done // max(1, total)
        self._progress(f"{self.name}: {stage}", at * _STEPS + share, count * _STEPS)

    def tidy(self) -> None:
        """Remove this model's float file before the next model makes its own."""
        for file in self._folder.iterdir():
            file.unlink()

    @cached_property
    def _hashes(self) -> dict[str, str]:
        total, done = self.source.size_bytes, 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            self._progress(f"{self.name}: hash", done, total)

        return self.source.hashes(on_bytes)

    @cached_property
    def _model_key(self) -> dict[str, str]:
        """What an importance matrix is kept under: the export's own key, where the floats are its.

        An export takes a quantized file's statistics on that file, not on floats made of it.
        """
        return self._hashes | ({"floats": "F16"} if self.source.quantized else {})

    @cached_property
    def _reference(self) -> Path:
        """The GGUF of floats to quantize from and to compare with."""
        if self.source.kind == "gguf" and not self.source.quantized:
            return self.source.path
        out = self._folder / "floats.gguf"
        step = partial(self._progress, f"{self.name}: floats")
        if self.source.kind == "hf":
            _fs.require_space(out, 2 * self.source.size_bytes)
            write = load("edgekit.exporters.hf_to_gguf:write", extra="export")
            write(self.source, out, "native", progress=lambda _, done, total: step(done, total))
        else:
            _fs.require_space(out, 4 * gguf.read(self.source.path).parameters)
            quantizer.quantize(
                self.source.path, out, "F16", imatrix=None, overrides=(), on_tensor=step
            )
        return out

    @cached_property
    def _matrix(self) -> Path:
        kept, found = imatrix.cached(self._model_key, self._calibration)
        if not found:
            imatrix.compute(
                self._reference,
                self._calibration,
                self._calibration_text,
                kept,
                partial(self._progress, f"{self.name}: importance matrix"),
            )
        return kept

    def _kept(self, what: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """``compute()``, or what an earlier run kept of it."""
        facts = [_ALGORITHM, version(), self._n_ctx, self._model_key, what]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        path = _fs.home("cache") / "sensitivity" / f"{key}.json"
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_bytes())
        body = compute()
        _fs.write_atomic(path, json.dumps(body).encode())
        return body

    def count_tokens(self, text: str) -> int:
        """How many tokens this model makes of a text."""

        def count() -> int:
            files = model_files(self._reference)
            found: int = _proc.call(
                "edgekit.sensitivity_subject:_count_tokens",
                {"model": vars(files), "text": text},
                timeout_s=_COUNT_TIMEOUT_S,
                memory_bytes=memory_limit([files], self._n_ctx),
                what=f"splitting the text for {self.name}",
            )
            return found

        return int(self._kept({"tokens of": digest(text)}, count))

    def loss(
        self,
        kind: str,
        overrides: tuple[tuple[str, str], ...],
        with_matrix: bool,
        text: str,
        on_step: Callable[[int, int], None],
    ) -> dict[str, Any]:
        """What ``evaluate.compare`` says of one quantized file, and what the file is like."""
        what = {
            "text": digest(text),
            "type": kind,
            "overrides": overrides,
            "calibration": asdict(self._calibration) if with_matrix else None,
        }
        on_step(0, 1)
        found: dict[str, Any] = self._kept(
            what, lambda: self._loss(kind, overrides, with_matrix, text, on_step)
        )
        on_step(1, 1)
        return found

    def _loss(
        self,
        kind: str,
        overrides: tuple[tuple[str, str], ...],
        with_matrix: bool,
        text: str,
        on_step: Callable[[int, int], None],
    ) -> dict[str, Any]:
        file = self._folder / "quantized.gguf"
        matrix = self._matrix if with_matrix else None
        _fs.require_space(file, self._reference.stat().st_size)
        try:
            quantizer.quantize(
                self._reference,
                file,
                kind,
                imatrix=matrix,
                overrides=overrides,
                on_tensor=lambda done, total: None,
            )
            found = evaluate.compare(
                file,
                self._reference,
                text,
                n_ctx=self._n_ctx,
                threads=self._threads,
                progress=lambda _, done, total: on_step(done, total),
            )
            header = gguf.read(file)
        finally:
            file.unlink(missing_ok=True)
        return found.to_dict() | {
            "size_bytes": header.file_size,
            "bits_per_weight": header.bits_per_weight,
            "types": {tensor.name: tensor.type for tensor in header.tensors},
        }

    def parts(
        self, preset: quant.GgufPreset, text: str, layers: int
    ) -> tuple[tuple[PartRow, ...], tuple[PartRow, ...]]:
        """The losses of each kind of tensor alone, and of some layers alone."""
        found = self._kept({"quantizable": preset.type}, lambda: self._quantizable(preset))
        sizes, floats = found["elements"], found["floats"]
        # The preset's own mixture would spare some tensors: here all get the same type.
        lowest = preset.type.removesuffix("_M")

        def part(name: str, pattern: str, on_step: Callable[[int, int], None]) -> PartRow:
            overrides = ((pattern, lowest), (".", floats))
            loss = self.loss(preset.type, overrides, preset.imatrix, text, on_step)
            mine = [each for each in sizes if re.search(pattern, each)]
            return PartRow(
                name=name,
                types=tuple(sorted({loss["types"][each] for each in mine})),
                share_of_weights=sum(sizes[each] for each in mine) / sum(sizes.values()),
                mean_kl=interval(loss["mean_kl"]),
            )

        kinds = sorted({tensor_kind(name) for name in sizes}, key=_place)
        blocks = _spread(sorted({int(m[1]) for m in map(_BLOCK.match, sizes) if m}), layers)
        return (
            tuple(
                part(
                    kind,
                    rf"(^|\.){re.escape(kind)}\.weight$",
                    partial(self.tell, "tensors", at, len(kinds)),
                )
                for at, kind in enumerate(kinds)
            ),
            tuple(
                part(
                    str(block),
                    rf"^blk\.{block}\.",
                    partial(self.tell, "layers", at, len(blocks)),
                )
                for at, block in enumerate(blocks)
            ),
        )

    def _quantizable(self, preset: quant.GgufPreset) -> dict[str, Any]:
        """The weights that the quantizer would change, their sizes, and the type of the floats."""
        rows = quantizer.plan(self._reference, preset.type, imatrix=preset.imatrix, overrides=())
        changed = {row.name for row in rows if row.type != row.source_type}
        header = gguf.read(self._reference)
        return {
            "elements": {
                each.name: each.elements for each in header.tensors if each.name in changed
            },
            "floats": header.main_type(),
        }

    def inputs(self, text: str) -> Iterator[InputRow]:
        """How the inputs of the matrices are spread, over the same text."""
        outliers = load("edgekit.runtimes.llama_activations:outliers", extra="llama")
        found = self._kept(
            {"inputs over": digest(text)},
            lambda: outliers(
                self._reference,
                text,
                n_ctx=self._n_ctx,
                threads=self._threads,
                on_chunk=partial(self._progress, f"{self.name}: activations"),
            ),
        )
        for name, figures in found.items():
            block = _BLOCK.match(name)
            yield InputRow(
                kind=tensor_kind(name),
                layer=int(block[1]) if block else None,
                kurtosis=figures["kurtosis"],
                max_to_median=figures["max_to_median"],
            )


def tensor_kind(name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``attn_q``."""
    return _BLOCK.sub("", name).removesuffix(".weight")


def _place(kind: str) -> tuple[int, str]:
    """Kinds in the order of the computation; strangers behind them."""
    return (_KINDS.index(kind) if kind in _KINDS else len(_KINDS), kind)


def _spread(blocks: list[int], count: int) -> list[int]:
    """At most ``count`` layers: the first, the last, and evenly between them."""
    if len(blocks) <= count:
        return blocks
    last = len(blocks) - 1
    return sorted({blocks[round(i * last / max(1, count - 1))] for i in range(count)})


def interval(body: dict[str, float | None]) -> Interval:
    """Back from JSON, where an open end is None."""
    low, high = body["low"], body["high"]
    assert body["value"] is not None
    return Interval(
        body["value"], -math.inf if low is None else low, math.inf if high is None else high
    )


def digest(text: str) -> str:
    """Hex SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _count_tokens(model: dict[str, Any], text: str) -> int:
    """In the child: the length of a text in the model's tokens."""
    with ModelFiles(**model).open(n_ctx=evaluate.MIN_N_CTX) as scorer:
        return len(scorer.tokenize(text))
