"""Recipe: a language model taught anew: all of its weights, or adapters beside frozen ones.

The methods: "full"; "lora" and "dora" (edgekit.training.adapters); "qlora", adapters on weights of
four bits (edgekit.training.four_bit). What is taught: "answers", the loss on them alone (Ouyang et
al. 2022, InstructGPT, section 3.5, its supervised part), or "preferences"
(edgekit.training.preferences). The folder has the merged model, and the adapters below it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from edgekit import _fs
from edgekit.errors import RecipeError
from edgekit.formats import json_file
from edgekit.training import (
    adapters,
    bootstrap,
    checkpoint,
    deploy,
    four_bit,
    language,
    preferences,
    pretrained,
    texts,
)
from edgekit.training.recipe import Recipe
from edgekit.training.report import Result, TrainingReport
from edgekit.training.run import Run, strictly_repeatable
from edgekit.training.settings import Settings, setting
from edgekit.training.trainer import Batch, Data, Loss, Task

HELD = "held-out.csv"  # what the model thinks of each held-out line, before and after
_CLASS = "AutoModelForCausalLM"
_OUTPUT = "lm_head"


@dataclass(frozen=True)
class FinetuneSettings(Settings):
    """The model, the method and the data."""

    model: str = setting("smollm2-135m", "a Hugging Face folder, or a GGUF file")
    method: Literal["lora", "qlora", "dora", "full"] = setting("lora", "what is trained")
    teach: Literal["answers", "preferences"] = setting("answers", "what is learned from")
    data: str = setting(
        "prose",
        "JSON lines: prompt and answer, or prompt, chosen and rejected; prose: WordNet's glosses",
    )
    limit: int = setting(4000, "lines of the data that are taken; 0: all")
    held: int = setting(60, "lines of those held out that are judged by")
    length: int = setting(128, "longest chat in tokens; the rest is cut off")
    rank: int = setting(8, "of the adapters")
    alpha: float = setting(16.0, "of the adapters: they count alpha / rank")
    beta: float = setting(0.1, "preferences: how dear it is to leave the old model")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.length < 8 or self.held < 1 or self.limit < 0:
            raise RecipeError("rank, held and limit must be more, and length 8 or more")
        if self.alpha <= 0 or self.beta <= 0:
            raise RecipeError("alpha and beta must be more than 0")


@dataclass(frozen=True)
class _Judged:
    """Figures on the lines held out, and one for each line: their mean is a figure too."""

    figures: dict[str, float]
    lines: list[float]


@dataclass(frozen=True)
class _Subject:
    """What is taught, and how it is judged. ``prepare(model, name)`` sees a model as it is before
    it is trained, under a name; ``figure`` is the one that each line held out has; a sample is of
    ``tokens`` in the mean.
    """

    data: Data
    loss: Loss
    judge: Callable[[torch.nn.Module], _Judged]
    terms: Callable[[Batch], torch.Tensor]
    unit: str
    prepare: Callable[[torch.nn.Module, str], None]
    figure: str
    tokens: float


def run(run: Run, settings: FinetuneSettings) -> TrainingReport:
    """Judge the model, train it, judge it again; write the merged folder and the adapters."""
    found = pretrained.opened(run, settings.model)
    chats = pretrained.Chats(found)
    teach = _answers if settings.teach == "answers" else _preferences
    subject = teach(run, settings, chats)
    model: Any = pretrained.model(found, _CLASS).to(run.accelerator.device)
    subject.prepare(model, "floats")
    first = _judged(run, subject, model)
    before = Result(
        "before",
        {"parameters": float(_count(model)), "weights_bytes": float(_bytes(model))} | first.figures,
    )
    torch.manual_seed(settings.seed)
    if settings.method == "qlora":
        four_bit.quantize_linears(model, {_OUTPUT})
        subject.prepare(model, "four-bit")
    if settings.method != "full":
        model = _with_adapters(model, settings)
    trained = {"trained_parameters": float(_count(model, trained=True))}
    trained["weights_bytes"] = float(_bytes(model))
    with strictly_repeatable():
        fitted = run.fit(
            Task(
                *("finetune", model, subject.data, subject.loss),
                lambda model: subject.judge(model).figures,
                subject.terms,
                unit=subject.unit,
            ),
            settings,
        )
    trained["training_tok_s"] = fitted.per_s * subject.tokens
    results, remarks = [before], [_about(settings)]
    state: dict[str, torch.Tensor] = {}
    adapter: adapters.Adapter | None = None
    last = first
    if run.main:
        if settings.method == "qlora" or run.shards:
            # Adapters go into the floats that the codes are of, and weights into a whole model.
            model = pretrained.model(found, _CLASS)
            if settings.method != "full":
                model = _with_adapters(model, settings)
        model.load_state_dict(_trained_part(model, fitted.state), strict=False)
        if settings.method != "full":
            adapter = adapters.taken_from(model, settings.model)
            trained["adapter_bytes"] = float(adapter.size_bytes)
            model = model.merge_and_unload()
        model = model.to(run.accelerator.device).eval()
        last = subject.judge(model)
        results.insert(0, Result(settings.method, trained | last.figures))
        state = pretrained.state_of(model)
        if settings.method == "qlora":
            remarks.append(
                f"loss on the weights of four bits {fitted.figures['loss']:.4f}, after merging"
                f" into the floats {last.figures['loss']:.4f}"
            )
        remarks.append(_gain(subject.figure, first, last))

    def fill(folder: Path) -> None:
        pretrained.write(folder, found, state)
        _fs.write_atomic(folder / HELD, _table(first, last).encode())
        if adapter:
            adapter.write(folder / "adapter")

    if settings.latency and run.main:
        results[0].figures.update(deploy.gguf_figures(run, fill))
    return run.finish(fill, results, remarks)


def _with_adapters(model: torch.nn.Module, settings: FinetuneSettings) -> torch.nn.Module:
    dora = settings.method == "dora"
    return adapters.put_in(model, rank=settings.rank, alpha=settings.alpha, dora=dora)


def _trained_part(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: state[name] for name, each in model.named_parameters() if each.requires_grad}


def _count(model: torch.nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def _bytes(model: torch.nn.Module) -> int:
    held = {each.data_ptr(): each for each in (*model.parameters(), *model.buffers())}
    return sum(each.numel() * each.element_size() for each in held.values())


def _judged(run: Run, subject: _Subject, model: torch.nn.Module) -> _Judged:
    """Figures in a file of the work: a run that goes on does not take them again."""

    def make(path: Path) -> None:
        _fs.write_atomic(path, json.dumps(vars(subject.judge(model.eval()))).encode())

    return _Judged(**json_file.read(run.once("before.json", make)))


def _gain(figure: str, first: _Judged, last: _Judged) -> str:
    found = bootstrap.paired(last.lines, first.lines)
    return (
        f"{figure} less what it was before: {found.value:+.3f} [{found.low:+.3f},"
        f" {found.high:+.3f}] (95%, paired bootstrap over the {len(first.lines)} lines held out)"
    )


def _table(first: _Judged, last: _Judged) -> str:
    rows = zip(first.lines, last.lines, strict=True)
    return "before,after\n" + "".join(f"{one!r},{other!r}\n" for one, other in rows)


def _about(settings: FinetuneSettings) -> str:
    what = {
        "answers": "loss: nats a token of held-out answers",
        "preferences": "loss: of held-out pairs (DPO, equation 7); accuracy: pairs whose better"
        " answer it has come to like more; likelier: pairs whose better answer it gives the higher"
        " probability",
    }
    return (
        f"{what[settings.teach]}; {settings.held} lines of {settings.data} held out;"
        " weights_bytes: of the model as it is trained"
    )


def _answers(run: Run, settings: FinetuneSettings, chats: pretrained.Chats) -> _Subject:
    path = texts.named(settings.data, "definitions.jsonl")
    train, held = texts.json_lines(path, ("prompt", "answer"), settings.limit)
    data, judged = (
        texts.Answers(texts.longest_first(chats.tokens(lines)), settings.length, chats.pad)
        for lines in (_two(train), _two(held[: settings.held]))
    )

    def judge(model: torch.nn.Module) -> _Judged:
        losses = language.answer_losses(model, judged)
        return _Judged({"loss": float(losses.mean())}, losses.tolist())

    return _Subject(
        *(data, language.loss, judge, texts.terms, "answers", lambda *_: None),
        figure="loss",
        tokens=float(data.lengths.double().mean()),
    )


def _two(lines: Sequence[tuple[str, ...]]) -> list[tuple[str, str]]:
    return [(line[0], line[1]) for line in lines]


def _preferences(run: Run, settings: FinetuneSettings, chats: pretrained.Chats) -> _Subject:
    path = texts.named(settings.data, "definitions.jsonl")
    if settings.data == path.parent.name:  # made of the glosses: the right one, and another word's
        pairs = texts.json_lines(path, ("prompt", "answer"), settings.limit)
        train, held = (
            [(*line, other[1]) for line, other in zip(lines, [*lines[1:], lines[0]], strict=True)]
            for lines in pairs
        )
    else:
        train, held = texts.json_lines(path, ("prompt", "chosen", "rejected"), settings.limit)
    sets = {}
    train = train[: settings.steps * settings.batch]  # what is never seen needs no reference
    for name, lines in (("train", train), ("held", held[: settings.held])):
        chosen, rejected = (
            chats.tokens([(line[0], line[place]) for line in lines]) for place in (1, 2)
        )
        sets[name] = preferences.Preferences(chosen, rejected, settings.length, chats.pad)

    def prepare(model: torch.nn.Module, name: str) -> None:
        def make(path: Path) -> None:
            found = {n: preferences.reference_of(model, each) for n, each in sets.items()}
            checkpoint.write(path, found)

        found, _ = checkpoint.read(run.once(f"reference-{name}.safetensors", make))
        for name, each in sets.items():
            each.reference = found[name]

    def judge(model: torch.nn.Module) -> _Judged:
        found = preferences.reference_of(model, sets["held"])
        figures = preferences.figures(found, sets["held"].reference, settings.beta)
        return _Judged(figures, preferences.likelier(found).tolist())

    return _Subject(
        sets["train"],
        preferences.loss_of(settings.beta),
        judge,
        lambda batch: torch.tensor(len(batch[0])),
        "pairs",
        prepare,
        figure="likelier_share",
        tokens=float(sets["train"].lengths.double().mean()),
    )


RECIPE = Recipe(
    "finetune",
    FinetuneSettings(
        steps=30,
        batch=8,
        lr=1e-3,
        warmup=0.1,
        weight_decay=0.0,
        checkpoint_every=10,
        log_every=5,
        precision="bf16",
    ),
    run,
)
