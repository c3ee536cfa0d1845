"""A small sound profile as plain data, for tests that spoil it or fill it in."""

from __future__ import annotations

import copy
from typing import Any


def figure(value: float) -> dict[str, Any]:
    return {"value": value, "source": "assumed", "from": "a test"}


def at(threads: int, value: float) -> dict[str, Any]:
    return {"threads": threads} | figure(value)


_BODY: dict[str, Any] = {
    "name": "tiny",
    "title": "Tiny board",
    "board": "Tiny Board",
    "architecture": "aarch64",
    "cpu": {
        "core": "Cortex-A53",
        "cores": figure(4),
        "clock_mhz": figure(1000),
        "features": {"value": ["NEON"], "source": "assumed", "from": "a test"},
        "l2_kib": figure(512),
        "l3_kib": None,
    },
    "threads": figure(4),
    "memory": {
        "total_mib": figure(1024),
        "system_mib": figure(128),
        "theoretical_gbps": figure(4),
        "read_gbps": [at(1, 1.0), at(4, 2.0)],
    },
    "peaks": {"float32_gflops": [at(1, 4), at(4, 16)], "float16_gflops": [], "int8_gops": []},
    "storage": {"name": "a card", "read_mbps": figure(20)},
    "power": {"idle_w": figure(1), "busy_w": None},
    "gpu": None,
    "engines": {},
    "products": [],
    "operator_us": [],
    "variants": {"tiny-2gb": {"title": "Tiny board, 2 GB", "total_mib": figure(2048)}},
}


def body() -> dict[str, Any]:
    """A copy of its own for each caller."""
    return copy.deepcopy(_BODY)
