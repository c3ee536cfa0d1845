"""A small classifier whose features tell how far generated images are from real ones.

Knows images and their classes; never how any were generated. Its distances hold within one run
alone: another run has another judge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from edgekit.training import classify
from edgekit.training.images import Labelled
from edgekit.training.minimal import Minimal
from edgekit.training.run import Run
from edgekit.training.settings import Settings
from edgekit.training.trainer import Task

_BATCH = 250
_SURE = 0.8  # the probability of the likeliest class, from which on an image is surely of one
Seen = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Judge:
    """A trained classifier of ``data``."""

    network: Minimal
    data: Labelled

    @torch.no_grad()
    def sees(self, images: torch.Tensor) -> Seen:
        """Features (float64 [images, width]: the mean over all places of what the votes are made
        of) and the probability of the likeliest class of each; images float32 from 0 to 1.
        """
        features, sure = [], []
        for each in images.split(_BATCH):
            inputs = self.data.normalized((each * 255).round().to(torch.uint8))
            inner = F.relu(self.network.norm(self.network.stages(inputs)))
            features.append(inner.mean(dim=(2, 3)).double())
            sure.append(self.network.votes(inner).mean(dim=(2, 3)).softmax(1).amax(1))
        return torch.cat(features), torch.cat(sure)

    def figures(self, made: torch.Tensor, real: Seen) -> dict[str, float]:
        """``frechet``, the distance of ``made`` to ``real``, and the share that surely has a
        class.
        """
        features, sure = self.sees(made)
        return {
            "frechet": frechet(features, real[0]),
            "share_sure": float((sure > _SURE).double().mean()),
        }


def trained(run: Run, data: Labelled, settings: Settings, *, steps: int) -> Judge:
    """The judge of a run, trained in ``steps`` as a task of it; whole on the main process alone."""
    torch.manual_seed(settings.seed)
    network = _network(data)
    loss = classify.loss_of(data, smoothing=0.1, shift=1, flip=False)
    own = replace(settings, steps=steps, batch=64, lr=3e-3, weight_decay=0.05, ema=0.0, patience=0)
    task = Task("judge", network, data.train, loss, classify.evaluation(data, data.test))
    fitted = run.fit(task, own)
    network = _network(data)
    if run.main:
        network.load_state_dict(fitted.state)
    return Judge(network.eval(), data)


def _network(data: Labelled) -> Minimal:
    return Minimal(data.shape[0], len(data.labels), [32, 64], [2, 2], kernel=3)


def frechet(one: torch.Tensor, other: torch.Tensor) -> float:
    """The distance of two sets of features [samples, width] as if each were Gaussian (Heusel et al.
    2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium",
    https://arxiv.org/abs/1706.08500, where the distance got its name FID):
    |m - n|^2 + trace(C + D - 2 (C D)^(1/2)).
    """
    apart = (one.mean(0) - other.mean(0)).square().sum()
    c, d = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(c)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # (C D)^(1/2) has the trace of (C^(1/2) D C^(1/2))^(1/2), which is symmetric.
    cross = torch.linalg.eigvalsh(root @ d @ root).clamp(min=0).sqrt().sum()
    return float(apart + c.trace() + d.trace() - 2 * cross)
