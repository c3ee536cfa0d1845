"""Crops of real photographs: what an image model is calibrated on, and what it is judged by.

    benchmarks/vision/crops.py OUT

writes OUT/calibration and OUT/held-out, square PNG files, for ``edgekit export --calibration`` and
``--eval-data``. No photograph serves both. The photographs are those that scikit-image,
scikit-learn and matplotlib ship in their wheels; the packages are looked into, not imported. The
same crops come out every time.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from edgekit.cli.ending import ending
from edgekit.errors import UsageError

# Package -> where its pictures lie.
_FOLDERS = {
    "skimage": "data",
    "sklearn": "datasets/images",
    "matplotlib": "mpl-data/sample_data",
}
# Of the held-out ones most show a thing that has a class in ImageNet.
_PHOTOGRAPHS = {
    "calibration": (
        "sklearn/china.jpg",
        "skimage/motorcycle_left.png",
        "matplotlib/grace_hopper.jpg",
        "skimage/clock_motion.png",
        "skimage/coins.png",
        "skimage/grass.png",
        "skimage/gravel.png",
        "skimage/hubble_deep_field.jpg",
    ),
    "held-out": (
        "skimage/chelsea.png",
        "skimage/coffee.png",
        "skimage/astronaut.png",
        "skimage/camera.png",
        "skimage/rocket.jpg",
        "sklearn/flower.jpg",
    ),
}
# Twice what is looked at: edgekit takes every second file of a folder for either part.
_CROPS = {"calibration": 32, "held-out": 86}  # of each photograph
_LEAST = 0.4  # of the shorter edge: smaller crops show no thing


def photograph(name: str) -> Image.Image:
    """One by "package/file". Raises SystemExit where the package is missing."""
    package, _, file = name.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install --no-deps scikit-image scikit-learn; pip install matplotlib")
    return Image.open(Path(found.submodule_search_locations[0]) / _FOLDERS[package] / file)


def crops(image: Image.Image, count: int, seed: int) -> Iterator[Image.Image]:
    """Squares of 40% to 100% of the shorter edge, anywhere in the picture."""
    generator = np.random.default_rng(seed)
    whole = image.convert("RGB")
    for _ in range(count):
        side = int(min(whole.size) * generator.uniform(_LEAST, 1.0))
        left, top = (int(generator.uniform(0, edge - side + 1)) for edge in whole.size)
        yield whole.crop((left, top, left + side, top + side))


def main() -> None:
    """Write both folders."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for part, names in _PHOTOGRAPHS.items():
        folder = out / part
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from None
        for seed, name in enumerate(names):
            for number, crop in enumerate(crops(photograph(name), _CROPS[part], seed)):
                crop.save(folder / f"{Path(name).stem}-{number:02}.png")


if __name__ == "__main__":
    with ending():
        main()
