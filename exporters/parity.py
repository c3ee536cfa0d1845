"""How far an exported float graph may be off from the torch module that it was traced from.

Knows arrays alone; never who computed them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit.errors import ParityError

# Of the largest value of an output: other kernels add up in another order.
_TOLERANCE = 1e-4
# Of a graph that rounds activations, on average over an output: what lies on the edge between two
# levels may go either way, and is off by a whole step then.
_ROUNDED_TOLERANCE = 0.1


def difference(name: str, engine: str, wanted: Any, got: Any, *, rounds: bool) -> float:
    """The largest difference of the output ``name`` as a share of its largest value; with
    ``rounds``, of a graph that rounds activations, the ratio of the root mean squares.

    Raises ParityError where rounding to float32 does not explain it.
    """
    if wanted.shape != got.shape:
        raise ParityError(f"output {name}: torch gives {wanted.shape}, {engine} {got.shape}")
    if not wanted.size:
        return 0.0
    exact = wanted.astype(np.float64)
    errors = np.abs(exact - got)
    if rounds:
        off, most, of = _rms(errors) / (_rms(exact) or 1.0), _ROUNDED_TOLERANCE, "root mean square"
    else:
        off, most, of = errors.max() / (np.abs(exact).max() or 1.0), _TOLERANCE, "largest value"
    if not off <= most:
        raise ParityError(
            f"output {name} of the exported graph is off by {off:.1e} of its {of}",
            hint="the model may take another path for other inputs than the traced ones",
        )
    return float(off)


def _rms(values: Any) -> float:
    return float(np.sqrt(np.square(values).mean()))
