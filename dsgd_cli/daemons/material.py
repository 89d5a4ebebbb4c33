"""Model and data of a run, from the run's `train` section: shared by workers and the probe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsgd_cli.learning.adapters import (
    Model,
    batch_size_of,
    forget,
    load_model,
    reference,
)
from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.learning.sharing import shared_data

Files = Mapping[str, "str | None"]
Tensors = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """What a worker computes with. `dtype` is that of the parameters and of all float data;
    `examples` are those of an epoch, which may be more than are on this host; `digest` is of what
    all workers must have alike, `data_digest` of the examples here."""

    model: Model
    data: Dataset
    dtype: str
    batch_size: int
    seed: int
    examples: int
    digest: str
    data_digest: str

    def initial(self) -> dict[str, np.ndarray[Any, Any]]:
        """The first parameters: the same in every process with the same seed."""
        rng = np.random.default_rng(self.seed)
        made = self.model.init(rng, self.data.example(self.batch_size))
        return {name: array.astype(self.dtype, copy=False) for name, array in made.items()}


def load(train: Mapping[str, Any], seed: int, files: Files) -> Material:
    """Raises UserCodeError and SpecError for whatever is wrong with the user's things."""
    dtype = train["dtype"]
    forget()
    paths = {what: _path(train[what], files.get(what)) for what in ("model", "data")}
    model = load_model(*reference(train["model"]), paths["model"])
    data = shared_data(*reference(train["data"]), paths["data"], dtype)
    for array in (data.x, data.y, data.x_test, data.y_test):
        array.flags.writeable = False  # a model that changes its input fails on its own line
    return Material(
        model=model,
        data=data,
        dtype=dtype,
        batch_size=batch_size_of(train),
        seed=seed,
        examples=data.examples,
        digest=_digest(model, data, paths["model"], seed),
        data_digest=data.digest(),
    )


def tensors(params: Mapping[str, np.ndarray[Any, Any]]) -> Tensors:
    return tuple((name, array.shape) for name, array in params.items())


def _path(ref: Mapping[str, Any], sent: str | None) -> Path | None:
    if ref["on_host"]:
        return Path(ref["path"])
    if not ref["path"] and ref["kind"] != "module":
        return None  # whatever was sent is of an earlier run
    here = sent or ref["path"]
    return Path(here) if here else None


def _digest(model: Model, data: Dataset, source: Path | None, seed: int) -> str:
    """Equal on all workers that will compute the same. The first parameters are left out: their
    last bits may depend on the processor, and one worker alone writes them."""
    form = [[each.shape[1:], each.dtype.kind == "f"] for each in (data.x, data.y)]
    hashed = hashlib.sha256(json.dumps([seed, model.name, data.classes, form]).encode())
    if source is not None and source.is_file():
        hashed.update(source.read_bytes())
    return hashed.hexdigest()
