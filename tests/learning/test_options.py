"""The options that the launcher checks are the factories' keyword arguments, defaults included."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from pydantic import BaseModel

from dsgd_cli.contract import options
from dsgd_cli.engine.optimizers import OPTIMIZERS
from dsgd_cli.learning.datasets import DATASETS, READERS
from dsgd_cli.learning.models import MODELS

TABLES: list[tuple[Mapping[str, type[BaseModel]], Mapping[str, Callable[..., Any]]]] = [
    (options.MODELS, MODELS),
    (options.DATASETS, DATASETS),
    (options.READERS, READERS),
    (options.OPTIMIZERS, OPTIMIZERS),
]


@pytest.mark.parametrize(("schemas", "factories"), TABLES)
def test_the_tables_agree(
    schemas: Mapping[str, type[BaseModel]], factories: Mapping[str, Callable[..., Any]]
) -> None:
    assert set(schemas) == set(factories)
    for name, schema in schemas.items():
        parameters = dict(inspect.signature(factories[name]).parameters)
        parameters.pop("path", None)  # of a reader: not an option
        assert {p: each.default for p, each in parameters.items()} == schema().model_dump()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_defaults_make_an_optimizer(name: str) -> None:
    OPTIMIZERS[name](**options.OPTIMIZERS[name]().model_dump())
