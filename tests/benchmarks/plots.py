"""Draws what compare.py measured: time against size, and time against block size.

plots.py results/compare.json results/
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    "size": "bytes pushed, and as many pulled",
    "block": "block size in bytes, for 100 MB pushed and pulled",
}


def draw(kind: str, curves: dict[str, list[list[float]]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, points in curves.items():
        sizes, seconds = zip(*points, strict=True)
        ours = label.startswith("dsgd")
        style = {"linewidth": 2.5} if ours else {"linewidth": 1.2, "linestyle": "--"}
        axes.plot(sizes, seconds, marker="o", markersize=4, label=label, **style)
    axes.set_xscale("log", base=2 if kind == "block" else 10)
    axes.set_yscale("log")
    axes.set_xlabel(LABELS[kind])
    axes.set_ylabel("seconds, median")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for kind, curves in json.loads(source.read_text())["curves"].items():
        draw(kind, curves, folder / f"time_against_{kind}.png")


if __name__ == "__main__":
    main()
