"""edgekit's own work on a board: one request as JSON on stdin, its answer as JSON lines on stdout.

Knows the few tasks that may be asked for, by name; never who asks, nor how the request came here.
`remote` is the other side.
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from edgekit import _proc, probe, storage
from edgekit.errors import UsageError
from edgekit.exporter import Progress


def main() -> None:
    """Read the request, do the task, say the answer."""
    # What the engine or a library prints must not mix with the answer.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        _proc.write_all(answers, json.dumps(message).encode() + b"\n")

    say(_proc.answer_of(lambda: _do(json.loads(sys.stdin.buffer.read()), say)))
    os._exit(0)  # without the engine's own clean-up


def _do(request: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> Any:
    if request["home"] is not None:  # all that edgekit keeps on a board lies in its one folder
        os.environ["EDGEKIT_HOME"] = request["home"]
    task = TASKS.get(request["task"])
    if task is None:
        raise UsageError("the edgekit on this board knows no such task", hint="run devices setup")
    return task(lambda message: say({"report": message}), **request["arguments"])


Report = Callable[[Any], None]
# Types that the weights of most files have: a second for each, and count of threads.
_PROBED = ("F32", "F16", "Q8_0", "Q6_K", "Q5_0", "Q4_K", "Q4_0")


def _progress(report: Report) -> Progress:
    return lambda stage, done, total: report({"progress": [stage, done, total]})


def _bench(
    report: Report, models: list[str], names: list[str], judge: bool, sweep: dict[str, Any]
) -> Any:
    """A report, as ``BenchReport.to_dict`` gives it."""
    from edgekit.bench import bench

    lists: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in sweep.items()
    }
    found = bench(*models, names=names, probe=judge, progress=_progress(report), **lists)
    return found.to_dict()


def _run(
    report: Report,
    model: str,
    prompt: str,
    system: str | None,
    raw: bool,
    params: dict[str, Any],
    fields: dict[str, Any],
    runtime: str | None,
) -> Any:
    """Pieces of text as reports, then the whole Generation."""
    from edgekit.runtime import GenerateParams, load

    given = GenerateParams(**params | {"stop": tuple(params.get("stop", ()))})
    with load(model, runtime=runtime, **fields) as session:
        chat = session.has_chat_template and not raw
        if system is not None and not chat:
            raise UsageError("--system needs a model with a chat template, and no --raw")
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        pieces = session.chat(messages, given) if chat else session.stream(prompt, given)
        for piece in pieces:
            report({"piece": piece})
        done = session.last
    body = dict(vars(done))
    body["logprobs"] = [[entry.token, entry.logprob, entry.top] for entry in done.logprobs]
    return body


def _latency(
    report: Report, models: list[str], names: list[str], judge: bool, sweep: dict[str, Any]
) -> Any:
    """A report, as ``LatencyReport.to_dict`` gives it."""
    from edgekit.latency import latency

    found = latency(*models, names=names, probe_limits=judge, progress=_progress(report), **sweep)
    return found.to_dict()


def _tensors(
    report: Report, model: str, text: str | None, image: str | None, top: int, threads: int | None
) -> Any:
    """Classes with their probabilities, or a vector; of a text, or of an image in base64."""
    from edgekit.runtime import load

    what = text if image is None else base64.b64decode(image)
    with load(model, n_threads=threads) as session:
        if session.task.endswith("classification"):
            return {"classes": session.classify(what, top=top)}
        return {"vector": session.embed(what)}


def _embed(report: Report, model: str, text: str, pooling: str, fields: dict[str, Any]) -> Any:
    """A vector."""
    from edgekit.runtime import load

    with load(model, **fields, embeddings=True) as session:
        return session.embed(text, pooling=pooling)


def _perplexity(report: Report, model: str, text: str, **fields: Any) -> Any:
    """The figures of ``evaluate.Perplexity``."""
    from edgekit import evaluate

    return evaluate.perplexity(model, text, progress=_progress(report), **fields).to_dict()


def _compare(report: Report, model: str, reference: str, text: str, **fields: Any) -> Any:
    """The figures of ``evaluate.Divergence``, with the KL divergence of every token."""
    from edgekit import evaluate

    found = evaluate.compare(model, reference, text, progress=_progress(report), **fields)
    return found.to_dict() | {"token_kl": found.token_kl}


def _probe(report: Report) -> Any:
    """The figures of ``device_probe.Measured``."""
    cores = len(os.sched_getaffinity(0))
    counts = [count for count in range(1, cores + 1) if count in (1, 2, 4, cores)]
    progress = _progress(report)
    limits = probe.limits(counts, fresh=True, progress=progress)
    engine = probe.limits([*{1, cores}], types=_PROBED, fresh=True, progress=progress)
    return {
        "rows": [vars(row) for row in limits.rows],
        "kernels": [vars(row) for row in engine.kernels],
        "operators": [vars(row) for row in engine.operators],
        "storage_read_bytes_s": storage.read_speed(progress),
        "busy": limits.busy or engine.busy,
    }


TASKS: dict[str, Callable[..., Any]] = {
    "bench": _bench,
    "latency": _latency,
    "run": _run,
    "tensors": _tensors,
    "embed": _embed,
    "perplexity": _perplexity,
    "compare": _compare,
    "probe": _probe,
}

if __name__ == "__main__":
    main()
