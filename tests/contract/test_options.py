"""The options that the launcher checks are the arguments that the factories take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from pydantic import BaseModel

from dsgd_cli.contract import options
from dsgd_cli.engine.optimizers import COMMON, OPTIMIZERS, make
from dsgd_cli.learning.datasets import DATASETS
from dsgd_cli.learning.models import MODELS
from dsgd_cli.learning.readers.table import READERS

TABLES: list[tuple[Mapping[str, type[BaseModel]], Mapping[str, Callable[..., Any]]]] = [
    (options.MODELS, MODELS),
    (options.DATASETS, DATASETS),
    (options.READERS, READERS),
    (options.OPTIMIZERS, OPTIMIZERS),
]


@pytest.mark.parametrize(("models", "factories"), TABLES)
def test_both_sides_know_the_same_names(
    models: Mapping[str, type[BaseModel]], factories: Mapping[str, Callable[..., Any]]
) -> None:
    assert list(models) == list(factories)


@pytest.mark.parametrize(
    ("model", "factory"),
    [(model, factories[name]) for models, factories in TABLES for name, model in models.items()],
)
def test_names_and_defaults_are_the_same(
    model: type[BaseModel], factory: Callable[..., Any]
) -> None:
    arguments = {
        name: parameter.default
        for name, parameter in inspect.signature(factory).parameters.items()
        if name != "path"
    }
    fields = {name: field.default for name, field in model.model_fields.items()}
    common = options.COMMON if issubclass(model, options.Rule) else ()
    assert {name: fields[name] for name in fields if name not in common} == arguments
    assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_the_defaults_make_an_optimizer(name: str) -> None:
    given = options.OPTIMIZERS[name]().model_dump()
    assert make(name, {key: given[key] for key in given if key not in COMMON}, "float32")


def test_both_sides_know_what_all_optimizers_have_in_common() -> None:
    assert options.COMMON == COMMON
