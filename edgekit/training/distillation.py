"""What a student learns from a teacher: its answers, softened, and what it makes inside.

Knows logits, features and the formulas; never a recipe, nor where a teacher comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

_SCALES = (0.25, 4.0)  # within which a teacher is calibrated

# Logits, a student's features brought to the teacher's channels, and these features as they are.
Answer = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]


def of_answers(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher's softmax at T || student's), summed over the batch (Hinton et al. 2015,
    "Distilling the Knowledge in a Neural Network", section 2: the factor T^2 keeps its gradients as
    large as those of the labels). Logits [batch, classes] both.
    """
    soft = F.log_softmax(student.float() / temperature, dim=1)
    target = F.log_softmax(teacher.float() / temperature, dim=1)
    divergence = F.kl_div(soft, target, reduction="sum", log_target=True)
    return divergence * temperature**2


def of_features(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Half the squared distance, in the mean over channels and places and relative to the teacher's
    own mean square, in the mean over the layers, summed over the batch (Romero et al. 2015,
    "FitNets: Hints for Thin Deep Nets", section 2.2, equation 3; relative, so that deep layers with
    small values count as much).
    """
    parts = []
    for mine, its in zip(student, teacher, strict=True):
        scale = its.square().mean().clamp(min=1e-8)
        parts.append((mine - its).square().flatten(1).mean(1).sum() / (2 * scale))
    return torch.stack(parts).mean()


def of_attention(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Half the squared distance of where both look, in the mean over the layers, summed over the
    batch. Where a layer looks is the sum of its channels' squares at each place, as a vector of
    length 1 (Zagoruyko and Komodakis 2017, "Paying More Attention to Attention",
    https://arxiv.org/abs/1612.03928, section 3.1: activation-based attention transfer; there it is
    the distance itself, which has no slope where both look alike).
    Features [batch, channels, height, width], channels of any number.
    """
    parts = []
    for mine, its in zip(student, teacher, strict=True):
        apart = _attention(mine) - _attention(its)
        parts.append(apart.square().sum() / 2)
    return torch.stack(parts).mean()


def _attention(features: torch.Tensor) -> torch.Tensor:
    return F.normalize(features.float().square().sum(1).flatten(1), dim=1)


@torch.no_grad()
def calibrating_scale(logits: torch.Tensor, classes: torch.Tensor) -> float:
    """What to multiply logits by for the least cross-entropy with the labels: 1/T of temperature
    scaling (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2), from 1/4 to
    4. Logits [images, classes], classes [images].

    The cross-entropy is convex in the scale, so its slope has one zero, which is cut in on.
    """
    logits = logits.double()
    right = logits.gather(1, classes[:, None])[:, 0]
    low, high = _SCALES
    for _ in range(50):
        scale = math.sqrt(low * high)
        expected = ((scale * logits).softmax(1) * logits).sum(1)
        if float((expected - right).mean()) < 0:
            low = scale
        else:
            high = scale
    return scale


class Pupil(nn.Module):
    """A student, and for each of its stages a 1x1 convolution that brings its channels to the
    teacher's (FitNets' regressor): ``pairs`` are the channels of both, none where features are not
    taught. In training mode it gives an Answer, in evaluation mode the student's logits alone.
    """

    def __init__(self, student: nn.Module, pairs: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__()
        self.student = student
        self.regressors = nn.ModuleList(nn.Conv2d(mine, its, 1) for mine, its in pairs)

    def forward(self, image: torch.Tensor) -> torch.Tensor | Answer:
        features = self.student.features(image)
        logits: torch.Tensor = self.student.classify(features[-1])
        if not self.training:
            return logits
        # Without regressors nothing is made.
        made = [layer(each) for layer, each in zip(self.regressors, features, strict=False)]
        return logits, made, features


def of_student(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The student's own part of a Pupil's state."""
    prefix = "student."
    return {n.removeprefix(prefix): each for n, each in state.items() if n.startswith(prefix)}
