"""Words for what is wrong in a specification.

A mistake is a place in the tree (path, and whether its key or its value is meant), what is wrong
there, and what to write instead. Validators raise `mistakes(...)`; `explain` turns pydantic's
findings into the same words, so that nobody ever reads pydantic's. One cause gives one mistake.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

Path = tuple[str | int, ...]
MAX_MISTAKES = 400  # of one specification: more than anybody reads


class Mistake(NamedTuple):
    """What is wrong at `path`, and what to write instead; `key`: the key itself is meant."""

    path: Path
    what: str
    hint: str = ""
    key: bool = False

    def __str__(self) -> str:
        return f"{self.what} – {self.hint}" if self.hint else self.what


def mistakes(found: Iterable[Mistake]) -> PydanticCustomError:
    """The exception by which a validator reports mistakes; paths start at what it validates."""
    listed = list(itertools.islice(found, MAX_MISTAKES))
    text = "; ".join(str(mistake) for mistake in listed).replace("{", "(").replace("}", ")")
    # pydantic formats the text with the context; braces of the user's must not look like fields.
    return PydanticCustomError("mistakes", text, {"mistakes": listed})


def mistake(
    what: str, hint: str = "", path: Path = (), *, key: bool = False
) -> PydanticCustomError:
    """The exception for a single mistake."""
    return mistakes([Mistake(path, what, hint, key)])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion for a misspelt word: the nearest known one, or all of them."""
    import difflib  # only who makes mistakes waits for it

    names = list(known)
    near = difflib.get_close_matches(word.lower()[:100], names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"known: {', '.join(names)}" if names else "nothing is known here"


def show(value: object, limit: int = 40) -> str:
    """A value on one line, short, as YAML would write it; control characters are escaped."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "a list"
    if isinstance(value, float):
        return repr(value)
    text = str(value)[: limit + 1]
    clean = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    if len(clean) > limit:
        clean = clean[: limit - 1] + "…"
    return clean if isinstance(value, int) else f"'{clean}'"


def explain(
    model: type[BaseModel], error: ValidationError, limit: int = MAX_MISTAKES
) -> list[Mistake]:
    """Findings of pydantic as mistakes, in the order found; about `limit` of them at most."""
    found: list[Mistake] = []
    for item in error.errors(include_url=False)[:limit]:
        path, kind, context = tuple(item["loc"]), item["type"], item.get("ctx", {})
        if kind == "mistakes":
            found += [m._replace(path=path + m.path) for m in context["mistakes"]]
        elif kind == "extra_forbidden":
            key = str(path[-1])
            hint = did_you_mean(key, fields_at(model, path[:-1]))
            found.append(Mistake(path, f"unknown key {show(key)}", hint, key=True))
        else:
            mistake = _in_words(path, kind, context, item["input"])
            if kind == "model_type" and not mistake.hint and (fields := fields_at(model, path)):
                mistake = mistake._replace(hint=f"write {{{fields[0]}: …}}")
            found.append(mistake)
    return found


def fields_at(model: type[BaseModel], path: Path) -> list[str]:
    """The keys that a mapping at `path` may have."""
    here: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue  # an element of a list: `model_of` looks through it
        field = here.model_fields.get(part) if here is not None else None
        here = model_of(field.annotation) if field is not None else None
    fields = {} if here is None else here.model_fields
    return [name for name, field in fields.items() if not _is_tag(field.annotation)]


def _is_tag(annotation: Any) -> bool:
    """Whether a field has one value only: it says which model this is, and nobody writes it."""
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, directly or in a list."""
    for candidate in (annotation, *get_args(annotation)):
        # (python 3.10 takes `tuple[Host, ...]` for a type)
        plain = get_origin(candidate) is None and isinstance(candidate, type)
        if plain and issubclass(candidate, BaseModel):
            found: type[BaseModel] = candidate
            return found
    return None


def _in_words(path: Path, kind: str, context: Mapping[str, Any], value: object) -> Mistake:
    if value is None:
        name = f"'{path[-1]}'" if path and isinstance(path[-1], str) else "this"
        return Mistake(path, f"{name} has no value", "give it one, or remove the line")
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("more than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
    }
    if kind in bounds:
        words, name = bounds[kind]
        bound = context[name]
        bound = int(bound) if bound == int(bound) else bound
        return Mistake(path, f"{show(value)} is out of range", f"it must be {words} {bound}")
    if kind == "too_long":
        return Mistake(path, "too many entries", f"{context['max_length']} at most")
    if kind == "too_short":
        return Mistake(path, "too few entries", f"at least {context['min_length']}")
    if kind == "literal_error":
        names = [part.strip(" '") for part in context["expected"].replace(" or ", ", ").split(",")]
        if isinstance(value, str):
            return Mistake(path, f"unknown value {show(value)}", did_you_mean(value, names))
        return Mistake(path, f"unknown value {show(value)}", f"known: {', '.join(names)}")
    return Mistake(path, f"expected {_expected(kind)}, found {show(value)}", _instead(kind, value))


def _expected(kind: str) -> str:
    for prefix, words in (
        ("int", "a whole number"),
        ("float", "a number"),
        ("finite", "a finite number"),
        ("bool", "true or false"),
        ("string", "text"),
        ("tuple", "a list"),
        ("list", "a list"),
        ("dict", "a mapping"),
        ("model", "a mapping"),
    ):
        if kind.startswith(prefix):
            return words
    return "something else"


def _instead(kind: str, value: object) -> str:
    """What to write instead, where that is clear."""
    if kind.startswith("bool") and isinstance(value, str):
        if value.lower() in ("yes", "on", "y", "true"):
            return "write true"
        if value.lower() in ("no", "off", "n", "false"):
            return "write false"
    if kind.startswith("int") and isinstance(value, float) and math.isfinite(value):
        return f"write {round(value)}"
    if kind.startswith(("int", "float")) and isinstance(value, str):
        try:
            number = float(value)  # `1_000` counts as well
        except ValueError:
            return ""
        whole = number.is_integer() and abs(number) < 1e15
        return f"write {int(number) if whole else number}"
    if kind.startswith("string") and isinstance(value, int | float):
        return f"put it in quotes: '{show(value)}'"
    return ""
