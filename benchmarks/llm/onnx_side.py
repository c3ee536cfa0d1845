"""One model of the comparison in ``onnx_lm.py``, in a process of its own that waits for its turns.

    onnx_side.py edgekit|genai|gguf MODEL THREADS

Knows how each engine reads a prompt and makes steps; never statistics. Lines in, JSON lines out:
``decode N`` and ``prefill N`` give seconds a token, ``logits CHUNKS.json OUT.npy`` writes the
logits of each chunk's second half.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

N_CTX = 1024


class EdgekitOnnx:
    """edgekit's own loop on ONNX Runtime, with the greedy choice of each token."""

    def __init__(self, model: Path, threads: int) -> None:
        from edgekit.runtimes.ort_engine import OrtEngine

        self._engine = OrtEngine(model, n_ctx=N_CTX, n_batch=512, threads=threads)

    def prefill(self, tokens: list[int]) -> None:
        self._engine.decode(tokens, 0)
        self._at, self._next = len(tokens), int(self._engine.logits().argmax())

    def step(self) -> None:
        self._engine.decode_one(self._next, self._at)
        self._at, self._next = self._at + 1, int(self._engine.logits().argmax())

    def logits(self, tokens: list[int], first: int) -> Any:
        self._engine.decode(tokens, 0, outputs=len(tokens) - first)
        return self._engine.logits_block(len(tokens) - first)


class EdgekitGguf:
    """edgekit's loop on llama.cpp."""

    def __init__(self, model: Path, threads: int) -> None:
        from edgekit.formats import gguf
        from edgekit.runtime import LoadParams
        from edgekit.runtimes.llama_engine import Engine

        params = LoadParams(n_ctx=N_CTX, n_gpu_layers=0)
        self._engine = Engine(model, gguf.read(model), params, threads=(threads, threads))

    def prefill(self, tokens: list[int]) -> None:
        self._engine.forget(0)
        self._engine.decode(tokens, 0)
        self._at, self._next = len(tokens), int(self._engine.logits().argmax())

    def step(self) -> None:
        self._engine.decode_one(self._next, self._at)
        self._at, self._next = self._at + 1, int(self._engine.logits().argmax())

    def logits(self, tokens: list[int], first: int) -> Any:
        self._engine.forget(0)
        self._engine.decode(tokens, 0, outputs=len(tokens) - first)
        return self._engine.logits_block(len(tokens) - first)


class Genai:
    """onnxruntime-genai, with its own greedy search."""

    def __init__(self, model: Path, threads: int) -> None:
        import onnxruntime_genai as genai

        settings = model / "genai_config.json"
        body = json.loads(settings.read_text())
        body["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        settings.write_text(json.dumps(body))
        self._genai, self._model, self._folder = genai, genai.Model(str(model)), model
        self._threads = threads
        decoder = body["model"]["decoder"]
        self._cells = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])

    def prefill(self, tokens: list[int]) -> None:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=N_CTX, min_length=N_CTX, do_sample=False)
        self._generator = self._genai.Generator(self._model, params)
        self._generator.append_tokens(np.array([tokens], np.int32))
        self._generator.generate_next_token()

    def step(self) -> None:
        self._generator.generate_next_token()

    def logits(self, tokens: list[int], first: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        path = str(self._folder / "model.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, len(tokens)), np.int64),
        }
        for value in session.get_inputs():
            if value.name.startswith("past_key_values"):
                feeds[value.name] = np.zeros(self._cells, np.float32)
        return session.run(["logits"], feeds)[0][0, first:]


def main() -> None:
    """Serve turns until stdin ends."""
    kind, model, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    sides = {"edgekit": EdgekitOnnx, "gguf": EdgekitGguf, "genai": Genai}
    side: Any = sides[kind](model, threads)
    random = np.random.default_rng(0)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        verb, *rest = line.split()
        if verb == "logits":
            chunks = json.loads(Path(rest[0]).read_text())
            rows = [np.array(side.logits(chunk, len(chunk) // 2)) for chunk in chunks]
            np.save(rest[1], np.stack(rows))
            print(json.dumps("done"), flush=True)
            continue
        count = int(rest[0])
        tokens = random.integers(1000, 40_000, 8 if verb == "decode" else count).tolist()
        if verb == "decode":
            side.prefill(tokens)
        started = time.perf_counter()
        if verb == "prefill":
            side.prefill(tokens)
        else:
            for _ in range(count):
                side.step()
        print(json.dumps((time.perf_counter() - started) / count), flush=True)


if __name__ == "__main__":
    main()
