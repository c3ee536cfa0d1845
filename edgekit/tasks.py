"""Scores a model on a task file: the likelihood of each answer, accuracy, and flips to a reference.

Must never know an engine, nor generate: it only asks how likely a given text is.

As lm-evaluation-harness does it (https://github.com/EleutherAI/lm-evaluation-harness): the answer
is the continuation whose tokens have the largest summed log-likelihood; a cloze is right when each
token of its target is the model's first choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from edgekit import _proc, intervals
from edgekit.errors import PromptTooLongError, UsageError
from edgekit.exporter import Progress, no_progress
from edgekit.formats import gguf, task_file
from edgekit.formats.task_file import Item, TaskFile
from edgekit.intervals import Interval
from edgekit.scorer import ModelFiles, Scorer, memory_limit, model_files

SLOT = "{text}"
_TEMPLATES = {"choice": SLOT, "cloze": SLOT, "label": f"{SLOT}\nLabel:"}
_BETWEEN_SHOTS = "\n\n"
_MAX_SHOTS = 100
_DEFAULT_N_CTX = 2048
# One question is many hundred times shorter, even of a large model on a slow board.
_SILENCE_S = 1800
_MAX_EXPONENT = 700.0  # what a double can still hold


@dataclass(frozen=True)
class Flips:
    """Two sides on the same questions: what one got right and the other did not.

    ``gained`` were wrong in the reference and are right here, ``lost`` the other way round; their
    share is the "flips" of https://arxiv.org/abs/2407.09141, which show a change of the model that
    equal accuracies hide. ``difference`` is the accuracy here minus the reference's. ``p_value`` is
    McNemar's exact test: how likely so uneven flips are between equally good sides.
    """

    gained: int
    lost: int
    share: Interval
    difference: Interval
    p_value: float

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {
            "share": self.share.to_dict(),
            "difference": self.difference.to_dict(),
        }


def flips(here: Sequence[bool], reference: Sequence[bool]) -> Flips:
    """What changed between two equally long rows of right and wrong answers."""
    gained = sum(now and not was for now, was in zip(here, reference, strict=True))
    lost = sum(was and not now for now, was in zip(here, reference, strict=True))
    return Flips(
        gained=gained,
        lost=lost,
        share=intervals.proportion(gained + lost, len(here)),
        difference=_difference(gained, lost, len(here)),
        p_value=mcnemar(gained, lost),
    )


def _difference(gained: int, lost: int, total: int) -> Interval:
    """The change of a share on the same lines, with the 95% interval of Agresti and Min.

    2005, https://doi.org/10.1002/sim.1781: half a line more in each cell of the table, so that a
    few lines without a flip do not pass for certainty, as they would with Student's t.
    """
    discordant, lead, lines = gained + lost + 1, gained - lost, total + 2
    error = math.sqrt(discordant - lead * lead / lines) / lines
    half = NormalDist().inv_cdf(0.975) * error
    low, high = lead / lines - half, lead / lines + half
    return Interval(lead / total, max(-1.0, low), min(1.0, high))


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided exact p-value: each flip is a fair coin's throw if nothing changed.

    Q. McNemar 1947, https://doi.org/10.1007/BF02295996, with the binomial instead of chi-squared.
    """
    flipped, tail, ways = gained + lost, 0, 1
    for heads in range(min(gained, lost) + 1):
        tail += ways
        ways = ways * (flipped - heads) // (heads + 1)
    return min(1.0, 2 * tail / (1 << flipped))


@dataclass(frozen=True)
class Answers:
    """What one model answered, line by line: indices of choices.

    ``picks`` by log-likelihood, ``picks_norm`` by log-likelihood per byte of the choice. In a cloze
    a pick is 0 for the target and -1 for anything else. ``scores`` are log-likelihoods of choices.
    """

    picks: tuple[int, ...]
    picks_norm: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class TaskScores:
    """One model's figures. ``accuracy_norm`` is None for a cloze, ``perplexity`` for all others.

    ``perplexity`` is exp(-mean log-likelihood) of whole targets, as lm-eval has it for LAMBADA.
    """

    accuracy: Interval
    accuracy_norm: Interval | None
    perplexity: Interval | None
    answers: Answers

    def to_dict(self) -> dict[str, Any]:
        """The figures, for JSON."""
        return {
            "accuracy": self.accuracy.to_dict(),
            "accuracy_norm": self.accuracy_norm and self.accuracy_norm.to_dict(),
            "perplexity": self.perplexity and self.perplexity.to_dict(),
        }


@dataclass(frozen=True)
class TaskReport:
    """The figures of a model on a task file, and of a reference if there was one.

    ``confusion`` (labelled sets only) counts the lines of each label, row, that got each label,
    column; ``recalls`` is the share of each row on its diagonal. ``chance`` is what guessing gets,
    0 for a cloze. ``perplexity_ratio`` is this model's by the reference's.
    """

    tasks: TaskFile
    shots: int
    scored: tuple[Item, ...]
    chance: float
    here: TaskScores
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    recalls: tuple[Interval | None, ...]
    reference: TaskScores | None
    flips: Flips | None
    flips_norm: Flips | None
    perplexity_ratio: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with what was answered to each line."""
        return {
            "tasks": self.tasks.name,
            "kind": self.tasks.kind,
            "lines": len(self.scored),
            "shots": self.shots,
            "chance": self.chance,
            **self.here.to_dict(),
            "labels": list(self.labels),
            "confusion": [list(row) for row in self.confusion],
            "recalls": [recall and recall.to_dict() for recall in self.recalls],
            "reference": self.reference and self.reference.to_dict(),
            "flips": self.flips and self.flips.to_dict(),
            "flips_norm": self.flips_norm and self.flips_norm.to_dict(),
            "perplexity_ratio": self.perplexity_ratio and self.perplexity_ratio.to_dict(),
            "answers": [self._answer(i, item) for i, item in enumerate(self.scored)],
        }

    def _answer(self, i: int, item: Item) -> dict[str, Any]:
        own = self.here.answers
        body: dict[str, Any] = {"line": item.line, "gold": item.gold, "pick": own.picks[i]}
        body |= {"pick_norm": own.picks_norm[i], "log_likelihoods": list(own.scores[i])}
        if self.reference:
            body["reference_pick"] = self.reference.answers.picks[i]
        return body


def evaluate(
    model: str | Path,
    tasks: str | Path,
    *,
    against: str | Path | None = None,
    template: str | None = None,
    delimiter: str | None = None,
    shots: int = 0,
    n_ctx: int | None = None,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> TaskReport:
    """Score an artifact or a GGUF file on a task file, and ``against`` a reference on the same.

    ``template`` is what the model reads, with ``{text}`` for the line's text; the choice follows
    after the ``delimiter``. None: a blank, where neither side has white space. The first ``shots``
    lines of the file become solved examples before each question, and are not scored. ``n_ctx``
    None: 2048 tokens, or as many as the model was trained for. Each model is scored in a child
    process of its own.
    Raises UsageError for the file and the options, PromptTooLongError, with the line, for a
    question that does not fit n_ctx, and what loading a model raises.
    """
    found = task_file.read(Path(tasks))
    template = _TEMPLATES[found.kind] if template is None else template
    if SLOT not in template:
        raise UsageError(f"the template {template!r} has no place for the {SLOT}")
    if not 0 <= shots <= _MAX_SHOTS:
        raise UsageError(f"shots must lie between 0 and {_MAX_SHOTS}, not {shots}")
    if shots >= len(found.items):
        raise UsageError(f"{found.name} has {len(found.items)} lines: {shots} shots leave none")
    scored = found.items[shots:]
    requests = prompts(found.items[:shots], scored, template, delimiter)
    models = [model_files(given) for given in (model, against) if given is not None]
    rows = [
        _scores(files, requests, n_ctx, threads, progress, stage)
        for files, stage in zip(models, ("score", "score reference"), strict=False)
    ]
    return _report(found, scored, shots, [judge(found.kind, scored, scores) for scores in rows])


# From lines to tokens


def prompts(
    examples: Sequence[Item], scored: Sequence[Item], template: str, delimiter: str | None = None
) -> list[dict[str, Any]]:
    """For each line the context, and the texts whose likelihood behind it is asked for."""
    head = "".join(
        context + _joint(context, item.choices[item.gold], delimiter) + _BETWEEN_SHOTS
        for item in examples
        for context in [template.replace(SLOT, item.text)]
    )
    requests = []
    for item in scored:
        context = head + template.replace(SLOT, item.text)
        # Blanks at the end belong to the next word: most tokenizers join them with it.
        kept = context.rstrip()
        if not kept:
            raise UsageError(f"line {item.line}: nothing stands before the answer")
        continuations = [
            context[len(kept) :] + _joint(context, choice, delimiter) for choice in item.choices
        ]
        requests.append({"line": item.line, "context": kept, "continuations": continuations})
    return requests


def _joint(context: str, choice: str, delimiter: str | None) -> str:
    """``choice`` as it goes on behind ``context``."""
    if delimiter is None:
        apart = not context or context[-1].isspace() or choice[0].isspace()
        delimiter = "" if apart else " "
    return delimiter + choice


def encode(scorer: Scorer, request: dict[str, Any]) -> tuple[list[int], list[list[int]]]:
    """Tokens of the context, with BOS where the model wants one, and of each continuation.

    A continuation's tokens are those of the whole text behind as many as the context has alone, as
    in lm-eval. Raises PromptTooLongError and UsageError, with the line.
    """
    begin = [] if scorer.bos is None else [scorer.bos]
    context = begin + scorer.tokenize(request["context"])
    continuations = []
    for text in request["continuations"]:
        tokens = (begin + scorer.tokenize(request["context"] + text))[len(context) :]
        if not tokens:
            raise UsageError(f"line {request['line']}: {text!r} adds no token to the text")
        if len(context) + len(tokens) > scorer.n_ctx:
            raise PromptTooLongError(
                f"line {request['line']} has {len(context) + len(tokens)} tokens with its answer,"
                f" which do not fit n_ctx {scorer.n_ctx}",
                hint="take a larger --n-ctx or fewer --shots",
            )
        continuations.append(tokens)
    return context, continuations


def trained_tokens(header: gguf.GgufHeader) -> int | None:
    """The context that a model was trained for; None where its file does not say."""
    found = header.metadata.get(f"{header.architecture}.context_length")
    return found if type(found) is int and found > 0 else None


def _scores(
    files: ModelFiles,
    requests: list[dict[str, Any]],
    n_ctx: int | None,
    threads: int | None,
    progress: Progress,
    stage: str,
) -> list[list[tuple[float, bool]]]:
    trained = trained_tokens(gguf.read(Path(files.path)))
    n_ctx = n_ctx or min(_DEFAULT_N_CTX, trained or _DEFAULT_N_CTX)
    progress(stage, 0, len(requests))
    scores: list[list[tuple[float, bool]]] = _proc.call(
        "edgekit.tasks:_score",
        {"model": vars(files), "requests": requests, "n_ctx": n_ctx, "threads": threads},
        silence_s=_SILENCE_S,
        memory_bytes=memory_limit([files], n_ctx),
        what=f"scoring {files.path}",
        on_report=lambda message: progress(stage, *message),
    )
    return scores


def _score(
    model: dict[str, Any], requests: list[dict[str, Any]], n_ctx: int, threads: int | None
) -> list[list[tuple[float, bool]]]:
    """In the child: for each request, each continuation's log-likelihood and whether it is greedy.

    All lines are checked before the first is evaluated: a long run shall not end in a typo.
    """
    scores = []
    with ModelFiles(**model).open(n_ctx=n_ctx, threads=threads) as scorer:
        encoded = [encode(scorer, request) for request in requests]
        for done, (context, continuations) in enumerate(encoded, 1):
            scores.append(scorer.log_likelihoods(context, continuations))
            _proc.report([done, len(encoded)])
    return scores


# From scores to figures


def judge(
    kind: str, items: Sequence[Item], scores: Sequence[Sequence[tuple[float, bool]]]
) -> TaskScores:
    """What the log-likelihoods of the choices say; the first of equally likely ones is picked."""
    logs = [[log for log, _ in row] for row in scores]
    if kind == "cloze":
        picks = [0 if row[0][1] else -1 for row in scores]
        norm = picks
    else:
        picks = [_largest(row) for row in logs]
        norm = [
            _largest([log / len(c.encode()) for log, c in zip(row, item.choices, strict=True)])
            for row, item in zip(logs, items, strict=True)
        ]
    return TaskScores(
        accuracy=_accuracy(items, picks),
        accuracy_norm=None if kind == "cloze" else _accuracy(items, norm),
        perplexity=_exp(intervals.mean([-row[0] for row in logs])) if kind == "cloze" else None,
        answers=Answers(tuple(picks), tuple(norm), tuple(map(tuple, logs))),
    )


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _accuracy(items: Sequence[Item], picks: Sequence[int]) -> Interval:
    return intervals.proportion(sum(_right(items, picks)), len(items))


def _right(items: Sequence[Item], picks: Sequence[int]) -> list[bool]:
    return [pick == item.gold for item, pick in zip(items, picks, strict=True)]


def _exp(interval: Interval) -> Interval:
    ends = vars(interval).values()
    return Interval(*(math.exp(end) if end < _MAX_EXPONENT else math.inf for end in ends))


def _report(
    tasks: TaskFile, scored: tuple[Item, ...], shots: int, found: Sequence[TaskScores]
) -> TaskReport:
    here, reference = found[0], found[1] if len(found) > 1 else None
    labels = scored[0].choices if tasks.kind == "label" else ()
    confusion = _confusion(scored, here.answers.picks, len(labels))
    ratio = flipped = flipped_norm = None
    if reference is not None:
        was, now = reference.answers, here.answers
        flipped = flips(_right(scored, now.picks), _right(scored, was.picks))
        if tasks.kind == "cloze":
            before, after = ([row[0] for row in answers.scores] for answers in (was, now))
            ratio = _exp(intervals.paired(before, after))
        else:
            flipped_norm = flips(_right(scored, now.picks_norm), _right(scored, was.picks_norm))
    return TaskReport(
        tasks=tasks,
        shots=shots,
        scored=scored,
        chance=_chance(tasks.kind, scored),
        here=here,
        labels=labels,
        confusion=confusion,
        recalls=tuple(
            intervals.proportion(row[i], sum(row)) if sum(row) else None
            for i, row in enumerate(confusion)
        ),
        reference=reference,
        flips=flipped,
        flips_norm=flipped_norm,
        perplexity_ratio=ratio,
    )


def _chance(kind: str, scored: Sequence[Item]) -> float:
    if kind == "cloze":
        return 0.0
    return math.fsum(1 / len(item.choices) for item in scored) / len(scored)


def _confusion(
    scored: Sequence[Item], picks: Sequence[int], labels: int
) -> tuple[tuple[int, ...], ...]:
    table = [[0] * labels for _ in range(labels)]
    if labels:
        for item, pick in zip(scored, picks, strict=True):
            table[item.gold][pick] += 1
    return tuple(map(tuple, table))
