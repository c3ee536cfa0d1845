"""edgekit: from a trained model to a small, verified file that runs fast on a small device.

The public names, loaded when first used. Importing this package imports no engine and no numpy.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekit.artifact import Artifact as Artifact
    from edgekit.bench import bench as bench
    from edgekit.converter import convert as convert
    from edgekit.errors import EdgekitError as EdgekitError
    from edgekit.exporter import export as export
    from edgekit.recipe import Recipe as Recipe
    from edgekit.runtime import GenerateParams as GenerateParams
    from edgekit.runtime import load as load
    from edgekit.source import ModelSource as ModelSource
    from edgekit.source import source as source

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "edgekit.artifact",
    "EdgekitError": "edgekit.errors",
    "GenerateParams": "edgekit.runtime",
    "ModelSource": "edgekit.source",
    "Recipe": "edgekit.recipe",
    "bench": "edgekit.bench",
    "convert": "edgekit.converter",
    "export": "edgekit.exporter",
    "load": "edgekit.runtime",
    "source": "edgekit.source",
}

__all__ = [  # noqa: RUF022 (grouped as in _HOMES, which a test compares)
    "__version__",
    "Artifact",
    "EdgekitError",
    "GenerateParams",
    "ModelSource",
    "Recipe",
    "bench",
    "convert",
    "export",
    "load",
    "source",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgekit' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """``source`` is a function and a submodule: the public name means the function, always."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Whoever first imports the submodule makes Python bind it here.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
