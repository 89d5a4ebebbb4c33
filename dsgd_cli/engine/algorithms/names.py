"""What is to be known of an algorithm by its options alone, on every side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def uses_rounds(algorithm: Mapping[str, Any]) -> bool:
    """Whether workers contribute to updates together, so that shards sum."""
    return algorithm["name"] in ("synchronous", "sandblaster")


def steps_per_update(algorithm: Mapping[str, Any], workers: int) -> int:
    """Gradient batches in one update of a block."""
    if algorithm["name"] == "synchronous":
        return max(1, workers - int(algorithm["backup_workers"]))
    return int(algorithm.get("push_every", 1))
