"""What a recipe is, and how one is run from its name and its settings.

Knows the shelf of recipes; never what any of them trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import RecipeError
from edgekit.registry import RECIPES
from edgekit.training import report
from edgekit.training.run import Run, finished, opened, stored
from edgekit.training.settings import Settings, difference, from_dict, with_pairs
from edgekit.training.trainer import Say


@dataclass(frozen=True)
class Recipe:
    """A recipe: its name, its settings with their defaults, and the function that runs it.

    ``run(run, settings)`` loads its data, calls ``run.fit`` for each model that it trains, the
    baseline among them, and ends with ``run.finish``. After a kill it is simply called again: what
    ``run.fit`` had finished is not trained twice.
    """

    name: str
    settings: Settings
    run: Callable[[Run, Any], report.TrainingReport]


def train(name: str, pairs: Sequence[str], out: Path, *, resume: bool, say: Say) -> dict[str, Any]:
    """Run the recipe ``name`` with ``pairs`` (``key=value``) into the folder ``out``; the report as
    JSON is returned. With ``resume`` a finished run is only shown, and an unfinished one goes on;
    settings that ``pairs`` do not name are then those of that run.

    Raises UnknownNameError, RecipeError, UsageError, MissingExtraError, TrainError and what export
    raises.
    """
    recipe: Recipe = RECIPES.load(name)
    was = stored(name, out) if resume else None
    done = finished(name, out) if resume and not was else None
    if done:
        # An earlier edgekit may have known other settings: those of now stand in for what it lacks.
        known = recipe.settings.to_dict()
        was = known | {key: value for key, value in done["settings"].items() if key in known}
    base = from_dict(type(recipe.settings), was, "settings.json") if was else recipe.settings
    settings = with_pairs(base, pairs)
    if done:
        if other := difference(was or {}, settings.to_dict()):
            raise RecipeError(
                f"the run in {out} is finished, with other settings: {other}",
                hint="another --out; or no --resume: a new run takes its place",
            )
        return done
    with opened(name, settings, out, resume=resume, say=say) as run:
        return recipe.run(run, settings).to_dict()
