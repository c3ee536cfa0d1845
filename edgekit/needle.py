"""Needle in a haystack: does a model find one sentence in a long text, by length and by depth?

Must never know an engine: it asks a Session questions, and reads the answers as text.

The test is Greg Kamradt's (https://github.com/gkamradt/LLMTest_NeedleInAHaystack), with a random
code as the needle, so that an answer is right or wrong and nobody has to judge it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from edgekit import intervals, machine, plot
from edgekit.errors import DoesNotFitError, UsageError
from edgekit.evaluate import read_text
from edgekit.exporter import Progress, no_progress
from edgekit.formats import gguf
from edgekit.intervals import Interval
from edgekit.runtime import DEFAULT_N_CTX, LoadParams, Session, load
from edgekit.scorer import model_files
from edgekit.tasks import Flips, flips, trained_tokens

DEFAULT_DEPTHS = (0, 25, 50, 75, 100)
DEFAULT_TRIALS = 3
_SHORTEST = 512
_ANSWER_TOKENS = 32
_SLACK_TOKENS = 8  # where the haystack meets the question, tokens may fall otherwise
_MIN_PARAGRAPH = 300  # characters: shorter ones of the calibration text are titles and code
_MAX_CELLS = 10_000

_INTRODUCTION = "Read this text with care. You will be asked about one fact in it.\n\n"
_FACT = "The access code of the archive in {place} is {code}."
_QUESTION = "What is the access code of the archive in {place}?"
_CHAT = _INTRODUCTION + "{text}\n\n" + _QUESTION + " Answer with the code alone."
_PLAIN = (
    _INTRODUCTION
    + "{text}\n\nQuestion: "
    + _QUESTION
    + "\nAnswer: The access code of the archive in {place} is"
)
_PLACES = (
    "Aarhus",
    "Bergen",
    "Cork",
    "Dresden",
    "Evora",
    "Ghent",
    "Kaunas",
    "Leeds",
    "Malmo",
    "Nantes",
    "Oviedo",
    "Parma",
    "Riga",
    "Tartu",
    "Utrecht",
    "Zagreb",
)


@dataclass(frozen=True)
class LengthScore:
    """One length of the grid. ``hits`` counts per depth, of ``trials`` each.

    ``tokens`` is the longest prompt that was asked, ``ttft_ms`` the time to the first token of one
    such prompt with an empty cache, and ``kv_bytes`` what the KV cache of ``length`` tokens takes.
    """

    length: int
    tokens: int
    hits: tuple[int, ...]
    recall: Interval
    ttft_ms: float
    kv_bytes: int


@dataclass(frozen=True)
class NeedleScores:
    """One model's grid; ``recalled`` holds every trial in order of length, depth and trial."""

    model: str
    chat: bool
    lengths: tuple[LengthScore, ...]
    recall: Interval
    recalled: tuple[bool, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the single trials, which ``hits`` counts."""
        rows = [
            vars(row) | {"hits": list(row.hits), "recall": row.recall.to_dict()}
            for row in self.lengths
        ]
        body = {"model": self.model, "chat": self.chat, "recall": self.recall.to_dict()}
        return body | {"lengths": rows}


@dataclass(frozen=True)
class NeedleReport:
    """The grid of a model, and of a reference on the same questions. ``depths`` are percent."""

    depths: tuple[int, ...]
    trials: int
    seed: int
    haystack: str
    here: NeedleScores
    reference: NeedleScores | None
    flips: Flips | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "depths": list(self.depths),
            "trials": self.trials,
            "seed": self.seed,
            "haystack": self.haystack,
            **self.here.to_dict(),
            "reference": self.reference and self.reference.to_dict(),
            "flips": self.flips and self.flips.to_dict(),
        }


@dataclass(frozen=True)
class _Plan:
    """What is asked of every model alike."""

    lengths: tuple[int, ...]
    depths: tuple[int, ...]
    trials: int
    seed: int
    sentences: tuple[str, ...]
    plain: bool
    threads: int | None


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    lengths: Sequence[int] | None = None,
    depths: Sequence[int] = DEFAULT_DEPTHS,
    trials: int = DEFAULT_TRIALS,
    seed: int = 0,
    text: Path | None = None,
    plain: bool = False,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> NeedleReport:
    """Ask an artifact or a GGUF file for a code hidden at each depth of texts of each length.

    ``lengths`` are tokens of prompt and answer together; None: 512, 1024 and so on up to what every
    model here was trained for, at most 4096. ``depths`` are percent of the text before the needle.
    Every cell has ``trials`` codes, drawn from ``seed``. ``text`` is the haystack, repeated where
    it is too short; None: edgekit's own prose. The question goes through the chat template, if the
    model has one and ``plain`` does not forbid it; the answer is greedy, and right when it holds
    the code. Raises UsageError, DoesNotFitError where the KV cache would not fit the free memory,
    and what loading a model raises.
    """
    models = [Path(given) for given in (model, against) if given is not None]
    headers = [gguf.read(Path(model_files(given).path)) for given in models]
    trained = min(trained_tokens(header) or DEFAULT_N_CTX for header in headers)
    grid = _lengths(lengths, trained)
    plan = _Plan(
        lengths=grid,
        depths=_depths(depths),
        trials=trials,
        seed=seed,
        sentences=sentences(text)[: grid[-1]],  # none is shorter than a token
        plain=plain,
        threads=threads,
    )
    if not 1 <= trials * len(plan.lengths) * len(plan.depths) <= _MAX_CELLS:
        raise UsageError(f"between 1 and {_MAX_CELLS} questions can be asked")
    for path in models:
        _require_memory(path, plan)
    stages = ("needle", "needle in reference")
    found = [_run(path, plan, progress, stage) for path, stage in zip(models, stages, strict=False)]
    reference = found[1] if len(found) > 1 else None
    return NeedleReport(
        depths=plan.depths,
        trials=trials,
        seed=seed,
        haystack="builtin" if text is None else text.name,
        here=found[0],
        reference=reference,
        flips=flips(found[0].recalled, reference.recalled) if reference else None,
    )


# The grid


def _lengths(asked: Sequence[int] | None, trained: int) -> tuple[int, ...]:
    if asked is None:
        most = min(trained, DEFAULT_N_CTX)
        return tuple(_SHORTEST << i for i in range(24) if _SHORTEST << i <= most) or (most,)
    lengths = tuple(sorted(set(asked)))
    if not lengths or lengths[-1] > trained:
        raise UsageError(
            f"the lengths must not pass the {trained} tokens that the model was trained for"
        )
    return lengths


def _depths(asked: Sequence[int]) -> tuple[int, ...]:
    depths = tuple(sorted(set(asked)))
    if not depths or depths[0] < 0 or depths[-1] > 100:
        raise UsageError("the depths must be percent, from 0 to 100")
    return depths


def kv_bytes(header: gguf.GgufHeader, n_ctx: int) -> int:
    """What the f16 KV cache of ``n_ctx`` tokens takes: an upper bound for sliding windows."""
    from edgekit.runtimes.gpu_layers import layer_cache_bytes

    names = [tensor.name for tensor in header.tensors]
    blocks = {name.split(".")[1] for name in names if name.startswith("blk.")}
    return len(blocks) * layer_cache_bytes(header, LoadParams(n_ctx=n_ctx))


def _require_memory(path: Path, plan: _Plan) -> None:
    """Refuse before the engine reserves it: Linux would grant it and kill somebody later."""
    header = gguf.read(Path(model_files(path).path))
    memory = machine.memory(machine.root())
    free = [size for size in (memory.available_bytes, memory.limit_bytes) if size is not None]
    cache = kv_bytes(header, plan.lengths[-1])
    needed = cache + header.file_size
    if free and needed > min(free):
        raise DoesNotFitError(
            f"a context of {plan.lengths[-1]} tokens needs {needed / 1e9:.1f} GB of memory with the"
            f" model ({cache / 1e9:.1f} GB of it KV cache), and {min(free) / 1e9:.1f} GB are free",
            hint="ask for smaller --lengths",
        )


# The haystack


def sentences(text: Path | None) -> tuple[str, ...]:
    """The haystack, sentence by sentence; the last one of a paragraph keeps its line breaks."""
    if text is None:
        whole = resources.files("edgekit.exporters").joinpath("calibration.txt").read_text("utf-8")
        # Its prose alone: no code, no formulas, and nothing that needs more than ASCII.
        paragraphs = [
            part
            for part in whole.split("\n")
            if len(part) > _MIN_PARAGRAPH and part.isascii() and "$" not in part
        ]
    else:
        paragraphs = read_text(text).split("\n")
    found = []
    for paragraph in paragraphs:
        parts = re.findall(r".+?(?:[.!?]['\")]?\s+|$)", paragraph.strip())
        found += [part.strip() + " " for part in parts[:-1]]
        found += [part.strip() + "\n\n" for part in parts[-1:]]
    if not found:
        raise UsageError("the haystack is blank")
    return tuple(found)


def haystack(
    sentences: Sequence[str], costs: Sequence[int], room: int, depth: int, needle: str
) -> str:
    """As many sentences as fit ``room`` tokens, from the first on and over again, with the needle.

    ``costs`` are the sentences' tokens. The needle stands between two sentences, where the share of
    tokens before it is closest to ``depth`` percent.
    """
    taken: list[str] = []
    before = [0]
    while before[-1] + costs[len(taken) % len(costs)] <= room:
        before.append(before[-1] + costs[len(taken) % len(costs)])
        taken.append(sentences[len(taken) % len(sentences)])
    wanted = before[-1] * depth / 100
    place = min(range(len(before)), key=lambda i: abs(before[i] - wanted))
    return "".join([*taken[:place], f"{needle} ", *taken[place:]]).strip()


# Asking


def _run(path: Path, plan: _Plan, progress: Progress, stage: str) -> NeedleScores:
    """All questions to one model."""
    header = gguf.read(Path(model_files(path).path))
    total = len(plan.depths) * plan.trials * sum(plan.lengths)
    done = 0
    progress(stage, done, total)
    with load(path, n_ctx=plan.lengths[-1], n_threads=plan.threads) as session:
        asker = _Asker(session, plan)
        rows, recalled = [], []
        for length in plan.lengths:
            session.reset()
            cells: dict[tuple[int, int], bool] = {}
            tokens, ttft_ms = 0, 0.0
            # From the end to the start: each question's prompt begins like the one before it, up
            # to its own needle, and that beginning is in the KV cache.
            for depth in reversed(plan.depths):
                for trial in range(plan.trials):
                    cells[depth, trial] = asker.finds(length, depth, trial)
                    tokens = max(tokens, session.last.prompt_tokens)
                    ttft_ms = ttft_ms or session.last.prompt_ms
                    done += length
                    progress(stage, done, total)
            found = [cells[depth, trial] for depth in plan.depths for trial in range(plan.trials)]
            rows.append(
                LengthScore(
                    length=length,
                    tokens=tokens,
                    hits=tuple(
                        sum(cells[depth, trial] for trial in range(plan.trials))
                        for depth in plan.depths
                    ),
                    recall=intervals.proportion(sum(found), len(found)),
                    ttft_ms=ttft_ms,
                    kv_bytes=kv_bytes(header, length),
                )
            )
            recalled += found
    return NeedleScores(
        model=str(path),
        chat=asker.chat,
        lengths=tuple(rows),
        recall=intervals.proportion(sum(recalled), len(recalled)),
        recalled=tuple(recalled),
    )


class _Asker:
    """Puts the questions to one session."""

    def __init__(self, session: Session, plan: _Plan) -> None:
        self._session = session
        self._plan = plan
        self.chat = session.has_chat_template and not plan.plain
        self._costs = [self._cost(sentence) for sentence in plan.sentences]
        self._answer("", "", _PLACES[0], 1)
        self._overhead = session.last.prompt_tokens

    def _cost(self, sentence: str) -> int:
        """The tokens of a sentence behind another one: most tokenizers join a blank with a word."""
        words = sentence.rstrip(" ")
        return max(1, self._tokens(f". {words}") - self._tokens("."))

    def _tokens(self, text: str) -> int:
        return len(self._session.tokenize(text))

    def finds(self, length: int, depth: int, trial: int) -> bool:
        """Whether the answer about one hidden code holds that code."""
        plan = self._plan
        draw = random.Random(f"{plan.seed} {length} {depth} {trial}")
        place, code = draw.choice(_PLACES), str(draw.randrange(100_000, 1_000_000))
        needle = _FACT.format(place=place, code=code)
        most = length - self._overhead - _ANSWER_TOKENS - _SLACK_TOKENS
        room = most - self._cost(needle)
        while room >= self._costs[0]:
            text = haystack(plan.sentences, self._costs, room, depth, needle)
            # A text has not quite as many tokens as its sentences, and may not have one too many.
            excess = self._tokens(text) - most
            if excess <= 0:
                return holds(self._answer(text, needle, place, _ANSWER_TOKENS), code)
            room -= excess
        raise UsageError(
            f"{length} tokens have no room for the haystack's first sentence: the question and"
            f" its answer take {length - most + self._cost(needle)} of them"
        )

    def _answer(self, text: str, needle: str, place: str, tokens: int) -> str:
        form = _CHAT if self.chat else _PLAIN
        prompt = form.format(text=text, place=place)
        if not self.chat:
            return self._session.complete(prompt, max_tokens=tokens).text
        messages = [{"role": "user", "content": prompt}]
        return "".join(self._session.chat(messages, max_tokens=tokens))


def holds(answer: str, code: str) -> bool:
    """Whether an answer holds the code as a number of its own: 123456, 123,456 or 123 456."""
    joined = re.sub(r"(?<=[0-9])[ ,.](?=[0-9])", "", answer)
    return re.search(rf"(?<![0-9]){code}(?![0-9])", joined) is not None


# The picture


def draw(report: NeedleReport, path: Path) -> None:
    """A heat map of the share of codes found, by length and depth, one for each model.

    Written to ``path`` (.png or .svg). Raises UsageError for another suffix and MissingExtraError
    without matplotlib.
    """
    grids = [scores for scores in (report.here, report.reference) if scores]
    titles = ("found", "found by the reference")
    with plot.figure(path, width_in=1.5 + 3.6 * len(grids), height_in=3.4) as figure:
        panels = figure.subplots(1, len(grids), squeeze=False, sharey=True)[0]
        for panel, scores, title in zip(panels, grids, titles, strict=False):
            image = _panel(panel, scores, report, title)
        panels[0].set_ylabel("depth of the needle (%)")
        figure.colorbar(image, ax=list(panels), label="share of codes found")


def _panel(panel: Any, scores: NeedleScores, report: NeedleReport, title: str) -> Any:
    shares = [
        [row.hits[i] / report.trials for row in scores.lengths] for i in range(len(report.depths))
    ]
    image = panel.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for i, line in enumerate(shares):
        for j, share in enumerate(line):
            hits = scores.lengths[j].hits[i]
            panel.text(
                j, i, f"{hits}/{report.trials}", ha="center", va="center", fontsize=8,
                color="black" if share > 0.6 else "white",
            )  # fmt: skip
    panel.set_xticks(range(len(scores.lengths)), [str(row.length) for row in scores.lengths])
    panel.set_yticks(range(len(report.depths)), [str(depth) for depth in report.depths])
    panel.grid(False)
    panel.set_xlabel("context (tokens)")
    panel.set_title(f"{title}: {scores.recall.value:.0%}")
    return image
