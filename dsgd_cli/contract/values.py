"""Kinds of values that fields hold: numbers, intervals, one of several named things.

A choice is written `adagrad` or `{adagrad: {learning_rate: 0.1}}`; in code it is the name and all
options, defaults included. The tables of what can be chosen are in `options`.
"""

# No `from __future__ import annotations`: pydantic would compile each annotation once more.

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsgd_cli.contract.durations import parse_every
from dsgd_cli.contract.mistakes import did_you_mean, explain, mistake, mistakes, show

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Table = Mapping[str, type[BaseModel]]

FROZEN = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class Every(BaseModel):
    """How often: a count of epochs, steps or seconds; written `1 epoch`, `500 steps`, `30s`."""

    model_config = FROZEN

    count: Number = Field(default=1.0, gt=0, le=1e12, description="how many")
    unit: Literal["epoch", "step", "s"] = Field(default="epoch", description="of what")

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = {"count": value, "unit": "s"}
        if isinstance(value, str):
            try:
                count, unit = parse_every(value)
            except ValueError as why:
                raise mistake(f"{show(value)} is not an interval", str(why)) from None
            value = {"count": count, "unit": unit}
        if not isinstance(value, Mapping):
            raise mistake(f"expected an interval, found {show(value)}", "write 1 epoch or 30s")
        if not value.get("count", 1):
            raise mistake("an interval of zero", "write 1 epoch, 500 steps or 30s")
        return value


class Work(Every):
    """A part of a run: a count of epochs or steps; written `1 epoch`, `500 steps`."""

    @model_validator(mode="after")
    def _no_time(self) -> "Work":
        if self.unit == "s":
            raise mistake("a learning rate knows no clock", "write 5 epochs or 500 steps")
        return self


def checked(table: Table, name: str, options: object, at: tuple[str, ...]) -> dict[str, Any]:
    """The options of a built-in, complete with defaults; mistakes are reported at `at`."""
    model = table[name]
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise mistake(f"expected options, found {show(options)}", "write {option: value}", at)
    try:
        return model.model_validate(dict(options)).model_dump(mode="json")
    except ValidationError as error:
        raise mistakes(m._replace(path=at + m.path) for m in explain(model, error)) from None


def known(table: Table, name: object, what: str, path: tuple[str, ...], *, key: bool) -> str:
    """The name, if the table has it."""
    if not isinstance(name, str) or name not in table:
        raise mistake(f"unknown {what} {show(name)}", did_you_mean(str(name), table), path, key=key)
    return name


def _single(table: Table, value: Mapping[str, object], what: str) -> str:
    """How to name one: an option that stands beside its owner belongs into it."""
    names = [key for key in value if key in table]
    if len(names) == 1:
        beside = [key for key in value if key != names[0]]
        if all(key in table[names[0]].model_fields for key in beside):
            return f"write {{{names[0]}: {{{beside[0]}: …}}}}"
    return f"name a single {what}"


def _only_key(table: Table, value: Mapping[str, object], what: str) -> str:
    if len(value) != 1:
        found = ", ".join(show(key) for key in value) or "nothing"
        raise mistake(f"expected one {what}, found {found}", _single(table, value, what))
    return next(iter(value))


def choice(table: Table, value: object, what: str) -> tuple[str, dict[str, Any]]:
    """`adagrad` or `{adagrad: {…}}` -> its name and all of its options."""
    if isinstance(value, str):
        return known(table, value, what, (), key=False), checked(table, value, {}, ())
    if isinstance(value, Mapping):
        name = known(
            table, _only_key(table, value, what), what, (str(next(iter(value))),), key=True
        )
        return name, checked(table, name, value[name], (name,))
    first = next(iter(table))
    raise mistake(f"expected a {what}, found {show(value)}", f"write {first} or {{{first}: {{}}}}")


def chosen(table: Table, value: object, what: str) -> dict[str, Any]:
    """The same as `{name: …, options: …}`, which is what a dump gives and is taken, too."""
    if isinstance(value, Mapping) and set(value) <= {"name", "options"}:
        first = next(iter(table))
        name = known(table, value.get("name", first), what, ("name",), key=False)
        options = checked(table, name, value.get("options"), ("options",))
    else:
        name, options = choice(table, value, what)
    return {"name": name, "options": options}
