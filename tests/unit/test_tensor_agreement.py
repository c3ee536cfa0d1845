"""The figures of a tensor receipt are what they say, on answers that are worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgekit.errors import GateError, ParityError
from edgekit.intervals import Interval
from edgekit.preprocess import ImageSteps, Matching, Preprocessing, TextSteps
from edgekit.receipt import Agreement, Gates, Latency, Receipt, differences
from edgekit.runtimes.ort_towers import TwoEncoders
from edgekit.runtimes.tensor_agreement import measure, ranking
from edgekit.sample_inputs import Samples

CLASSES = Preprocessing("image-classification")  # no image is opened: the feeds are made here
TEXT = TextSteps("tokenizer.json", 8, "cls", normalize=True, pad_id=0, padded=False)
VECTORS = Preprocessing("text-embedding", text=TEXT)


class Answers:
    """A session that looks its answers up."""

    def __init__(self, *rows: Any) -> None:
        self._rows = rows

    def run(self, feed: dict[str, Any]) -> dict[str, Any]:
        row = self._rows[feed["number"]]
        outputs = row if isinstance(row, tuple) else (row,)
        return {f"out{i}": np.array([each], float) for i, each in enumerate(outputs)}


def _agreement(mine: Answers, theirs: Answers, count: int, steps: Preprocessing) -> Agreement:
    feeds = [{"number": i} for i in range(count)]
    return measure(mine, theirs, Samples(feeds, "test", "0"), steps, lambda *_: None)  # type: ignore[arg-type]


def test_classes_and_their_distribution() -> None:
    mine = Answers([0, 2, 1, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0])
    theirs = Answers([0, 1, 2, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0])
    found = _agreement(mine, theirs, 2, CLASSES)
    assert found.top1 and found.top5 and found.mean_kl
    assert (found.top1.value, found.top5.value) == (0.5, 1.0)
    # Two classes change places: KL is the difference of their chances times that of their logits.
    total = math.e + math.e**2 + 5
    assert found.mean_kl.value == pytest.approx((math.e**2 - math.e) / total / 2)
    assert found.cosine.value == pytest.approx((4 / 5 + 1) / 2)
    assert (found.least_cosine, found.max_error) == (pytest.approx(4 / 5), 1.0)
    assert found.neighbours is None


def test_neighbours_of_vectors() -> None:
    theirs = Answers([1, 0], [1, 0.1], [0, 1], [0.1, 1])
    assert _agreement(theirs, theirs, 4, VECTORS).neighbours == Interval(
        1.0, pytest.approx(0.51, abs=0.01), 1.0
    )
    mixed = Answers([1, 0], [0.1, 1], [0, 1], [1, 0.1])
    found = _agreement(mixed, theirs, 4, VECTORS)
    assert found.neighbours and found.neighbours.value == 0.0
    assert found.top1 is None


def test_of_several_outputs_the_worst_counts() -> None:
    theirs = Answers(([1, 0], [1, 0]))
    found = _agreement(Answers(([1, 0], [0, 1])), theirs, 1, Preprocessing("tensors"))
    assert found.cosine.value == 0.0
    with pytest.raises(ParityError, match="no number"):
        _agreement(Answers(([1, 0], [math.nan, 1])), theirs, 1, Preprocessing("tensors"))
    with pytest.raises(ParityError, match="shape"):
        _agreement(Answers(([1, 0], [1])), theirs, 1, Preprocessing("tensors"))


def _receipt(**changed: Any) -> Receipt:
    figures = {
        "data": "builtin",
        "data_sha256": "0",
        "samples": 64,
        "cosine": Interval(0.99, 0.98, 1.0),
        "least_cosine": 0.9,
        "max_error": 0.1,
        "mean_kl": Interval(0.02, 0.01, 0.03),
        "top1": Interval(0.95, 0.9, 0.97),
        "top5": None,
        "neighbours": None,
    }
    latency = Latency(2.0, 4.0, Interval(2.0, 1.9, 2.1), 9, 2, "cpu", False)
    return Receipt("proven", agreement=Agreement(**figures | changed), latency=latency)


@pytest.mark.parametrize(
    ("passed", "failed"),
    [
        ({"min_cosine": 0.98}, {"min_cosine": 0.995}),
        ({"max_kld": 0.05}, {"max_kld": 0.01}),
        ({"min_top1": 0.9}, {"min_top1": 0.96}),
        ({"min_speed_ratio": 1.5}, {"min_speed_ratio": 2.5}),
    ],
)
def test_each_gate_can_pass_and_can_fail(passed: dict[str, Any], failed: dict[str, Any]) -> None:
    Gates(**passed).check(_receipt(), 1)
    with pytest.raises(GateError):
        Gates(**failed).check(_receipt(), 1)


def test_a_receipt_survives_json_and_shows_where_it_no_longer_holds() -> None:
    was = _receipt()
    assert Receipt.from_dict(was.to_dict()) == was
    assert differences(was, _receipt(max_error=0.2)) == []
    for change in (
        {"cosine": Interval(0.9, 0.8, 1.0)},
        {"top1": Interval(0.5, 0.4, 0.6)},
        {"mean_kl": None},
        {"samples": 32},
        {"data_sha256": "1"},
    ):
        assert len(differences(was, _receipt(**change))) == 1


class Encoder:
    """Gives out the vectors that it is asked for by their numbers."""

    def __init__(self, vectors: Any) -> None:
        self.vectors = vectors

    def run(self, feed: Any) -> dict[str, Any]:
        return {"out": self.vectors[feed["number"]][None]}


def test_a_ranking_counts_the_likeliest_texts_and_their_order() -> None:
    numbers = [{"number": i} for i in range(4)]
    vectors = np.eye(4, dtype=np.float32) + 0.1
    image = ImageSteps("x", 8, 8, None, 8, 8, False, "bilinear", 1.0, (0.0,), (1.0,))
    matching = Matching("text.onnx", 100.0, 0.0, alone=False)
    steps = Preprocessing(
        "image-text",
        image=image,
        text=VECTORS.text,
        matching=matching,
    )
    sound = TwoEncoders(*(_session(vectors) for _ in range(2)), matching)
    swapped = TwoEncoders(_session(vectors), _session(vectors[[1, 0, 2, 3]]), matching)
    same = ranking(sound, sound, [numbers, numbers], steps)
    assert (same.top1.value, same.order.value, same.max_error) == (1, pytest.approx(1), 0)
    other = ranking(swapped, sound, [numbers, numbers], steps)
    assert (other.images, other.texts, other.top1.value) == (4, 4, 0.5)
    assert other.order.value < 0.9 and other.max_error > 0.5


def _session(vectors: Any) -> Any:
    found: Any = Encoder(vectors)
    found.inputs = found.outputs = ()
    return found
