"""A residual network with its weights: as a module, as a folder, and beside another of its kind.

Knows networks, folders and figures; never how the weights came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgekit import _fs, network_folder
from edgekit.errors import RecipeError
from edgekit.network_folder import Network
from edgekit.training import bootstrap, checkpoint, classify, residual
from edgekit.training.images import Images, Labelled
from edgekit.training.run import Run
from edgekit.training.trainer import Fitted

NETWORK = "residual"  # its row in registry.NETWORKS
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """``figures`` are those of the test images."""

    config: Mapping[str, Any]
    state: State
    figures: Mapping[str, float]

    def network(self) -> torch.nn.Module:
        """A new module, on the CPU."""
        return loaded(self.config, self.state)

    @property
    def parameters(self) -> int:
        """Values that training sets."""
        return sum(each.numel() for each in residual.build(self.config).parameters())

    def fill(self, data: Labelled, folder: Path) -> None:
        """Write a folder that ``edgekit export`` takes, and ``read``."""
        about = Network(NETWORK, self.config, (1, *data.shape), data.preprocess())
        _fs.write_atomic(folder / network_folder.FILE, about.to_bytes())
        checkpoint.write(folder / network_folder.WEIGHTS, self.state)


def read(folder: Path, data: Labelled) -> Trained:
    """A folder that ``fill`` wrote, for the images of ``data``; it has no figures.

    Raises SourceError and CorruptArtifactError for a broken folder, RecipeError for another network
    or other images.
    """
    about = network_folder.read(folder)
    if about.network != NETWORK:
        raise RecipeError(f"{folder} holds a network of the kind '{about.network}'")
    labels = (about.preprocess or {}).get("labels")
    if about.input_shape != (1, *data.shape) or labels != list(data.labels):
        raise RecipeError(f"the network in {folder} was trained on other images, or other classes")
    network = residual.build(about.config)
    shapes = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    network_folder.check_weights(folder, shapes)
    return Trained(about.config, checkpoint.read(folder / network_folder.WEIGHTS)[0], {})


def loaded(config: Mapping[str, Any], state: State) -> torch.nn.Module:
    """A new module with these weights, on the CPU."""
    network = residual.build(config)
    network.load_state_dict(state)
    return network


def weights(run: Run, fitted: Fitted) -> State:
    """Of a phase, for every process: where the model is distributed, one alone has them."""
    name = f"{fitted.name}.safetensors"
    path = run.once(name, lambda path: checkpoint.write(path, fitted.state))
    return checkpoint.read(path)[0]


def compared(
    models: Mapping[str, Trained], pairs: list[tuple[str, str]], data: Labelled, test: Images
) -> list[str]:
    """A sentence for each pair of names: the first one's accuracy less the second's, image by
    image.
    """
    found = {}
    for name in {name for pair in pairs for name in pair}:
        hits = classify.right(models[name].network(), data, test)
        found[name] = [float(hit) for hit in hits]
    sentences = []
    for one, other in pairs:
        gain = bootstrap.paired(found[one], found[other])
        sentences.append(
            f"accuracy of {one} less that of {other}, after as many steps:"
            f" {100 * gain.value:+.2f} [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}] points,"
            " paired bootstrap over the test images, one seed"
        )
    return sentences
