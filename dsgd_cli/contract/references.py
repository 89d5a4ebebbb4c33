"""Where a model or the data come from: built in, a file, a module; sent along or on the hosts.

Short forms (`mlp`, `path/to/model.py`, `{csv: path, label: y}`) are made long here. Nothing here
touches a file.
"""

# No `from __future__ import annotations`: pydantic would compile each annotation once more.

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import Field, model_validator

from dsgd_cli.contract.mistakes import did_you_mean, mistake, show
from dsgd_cli.contract.options import DATASETS, MODEL_FILES, MODELS, READERS, Source
from dsgd_cli.contract.texts import Tree, printable
from dsgd_cli.contract.values import Table, checked, choice, known

MODULE = r"[A-Za-z_][A-Za-z0-9_]{0,99}(\.[A-Za-z_][A-Za-z0-9_]{0,99}){0,20}"
TORCH = re.compile(r".*[^/]\.py:[A-Za-z_]\w{0,99}")  # a file, and a class or function in it
LOAD = "load"  # a function of the user's, in front of its file or module
ON_HOST = "host:"  # in front of a path: it is on the hosts already
# what a path is by the end of its name
MODEL_SUFFIXES = {".py": "file"}
DATA_SUFFIXES = {
    ".py": "file",
    ".npz": "npz",
    ".csv": "csv",
    ".svm": "svmlight",
    ".svmlight": "svmlight",
    ".libsvm": "svmlight",
}


def _reference(text: str, table: Table, suffixes: Mapping[str, str], what: str) -> dict[str, Any]:
    """A string that names a built-in, a file or a module -> the long form without options."""
    on_host = text.startswith(ON_HOST)
    path = text.removeprefix(ON_HOST)
    printable(text)
    if on_host and not path.startswith("/"):
        raise mistake(f"{show(text)} is not absolute", "write host:/path")
    for suffix, kind in suffixes.items():
        if path.endswith(suffix) and path.rpartition("/")[2] != suffix:
            return {"kind": kind, "path": path, "on_host": on_host}
    if on_host or "/" in path or path.startswith((".", "~")):
        hint = "its name must end with .py"
        hint += " (or say what it is: {csv: path})" if len(suffixes) > 1 else ""
        raise mistake(f"{show(text)} is not a {what}", hint)
    if path in table:
        return {"kind": "builtin", "name": path}
    if "." in path and re.fullmatch(MODULE, path):
        return {"kind": "module", "name": path}
    hint = f"{did_you_mean(path, table)} (your own: path/to/{what}.py)"
    raise mistake(f"unknown {what} {show(text)}", hint)


class _Ref(Tree):
    """Where a model or the data come from."""

    name: str = Field(default="", description="name of the built-in, the module, or torch's class")
    path: str = Field(
        default="", description="the file or folder, on this machine unless `on_host`"
    )
    on_host: bool = Field(default=False, strict=True, description="it is on the hosts already")
    options: dict[str, Any] = Field(default={}, description="options of the built-in")


def _long_ref(value: Mapping[str, object], table: Table, readers: Table, what: str) -> object:
    """Checks the long form `{kind: …, name: …, path: …, options: …}`, as a dump gives it."""
    kind, name, path = value.get("kind"), value.get("name", ""), value.get("path", "")
    fields = (DataRef if what == "data" else ModelRef).model_fields
    ref = {key: value[key] for key in value if key in fields}
    if len(ref) != len(value):
        unknown = next(key for key in value if key not in ref)
        hint = did_you_mean(unknown, fields)
        raise mistake(f"unknown key {show(unknown)}", hint, (unknown,), key=True)
    if kind in ("file", "module") and value.get("options"):
        raise mistake(f"a {what} of your own takes no options", "remove them", ("options",))
    if kind == "builtin":
        name = known(table, name, what, ("name",), key=False)
        return {**ref, "options": checked(table, name, value.get("options"), ("options",))}
    if kind in readers:
        ref["options"] = checked(readers, str(kind), value.get("options"), ("options",))
    if kind == "module" and (not isinstance(name, str) or re.fullmatch(MODULE, name) is None):
        raise mistake(f"{show(name)} is not a module", "write package.module", ("name",))
    if kind != "module" and (kind == "file" or kind in readers):
        if not isinstance(path, str):
            raise mistake(f"expected a path, found {show(path)}", "", ("path",))
        printable(path)
    return ref


class ModelRef(_Ref):
    """The model: a built-in, a file or a module with plain functions, or a module of torch's."""

    kind: Literal["builtin", "file", "module", "torch"] = Field(
        default="builtin", description="what it is"
    )

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        if isinstance(value, str):
            if TORCH.fullmatch(value):
                raise mistake(f"{show(value)} is not a model", f"write {{torch: {show(value)}}}")
            value = _reference(value, MODELS, MODEL_SUFFIXES, "model")
        elif isinstance(value, Mapping) and "torch" in value:
            value = _torch_mapping(value)
        elif isinstance(value, Mapping) and "kind" not in value:
            name, options = choice(MODELS, value, "model")
            value = {"kind": "builtin", "name": name, "options": options}
        if not isinstance(value, Mapping):
            raise mistake(f"expected a model, found {show(value)}", "write mlp or path/to/model.py")
        ref = _long_ref(value, MODELS, MODEL_FILES, "model")
        if value.get("kind") == "torch" and not str(value.get("name")).isidentifier():
            what = f"{show(value.get('name'))} is not the name of a class"
            raise mistake(what, "write a name in the file", ("name",))
        return ref


def _torch_mapping(value: Mapping[str, object]) -> dict[str, Any]:
    """`{torch: path/to/net.py:Net}` -> the long form."""
    text = value["torch"]
    if len(value) > 1:
        other = next(key for key in value if key != "torch")
        raise mistake(f"unknown key {show(other)}", "torch takes no options", (other,), key=True)
    if not isinstance(text, str) or TORCH.fullmatch(text) is None:
        hint = "write path/to/net.py:Net"
        raise mistake(f"{show(text)} is not a file and a class in it", hint, ("torch",))
    printable(text)
    on_host = text.startswith(ON_HOST)
    path, _, name = text.removeprefix(ON_HOST).rpartition(":")
    if on_host and not path.startswith("/"):
        raise mistake(f"{show(text)} is not absolute", "write host:/path", ("torch",))
    return {"kind": "torch", "path": path, "name": name, "on_host": on_host}


class DataRef(_Ref):
    """The data: a built-in, arrays, a table, a file or a module with a `load` function."""

    kind: Literal["builtin", "npz", "csv", "svmlight", "idx", "images", "file", "module"] = Field(
        default="builtin", description="what it is"
    )
    per_host: bool = Field(
        default=False, strict=True, description="each host has examples of its own"
    )

    @model_validator(mode="before")
    @classmethod
    def _long(cls, value: object) -> object:
        if isinstance(value, str):
            value = _reference(value, DATASETS, DATA_SUFFIXES, "data")
        elif isinstance(value, Mapping) and "kind" not in value:
            value = _data_mapping(value)
        if not isinstance(value, Mapping):
            raise mistake(f"expected data, found {show(value)}", "write digits or {npz: path}")
        return _long_ref(value, DATASETS, READERS, "data")

    @model_validator(mode="after")
    def _sense(self) -> "DataRef":
        if self.per_host and self.kind == "builtin":
            raise mistake("what is built in is the same on every host", "remove `per_host`")
        if self.per_host and self.kind in READERS and not self.on_host:
            what = "a path on this machine is the same for every host"
            raise mistake(what, "write host:/path, or remove `per_host`", (self.kind,))
        return self


def _data_mapping(value: Mapping[str, object]) -> dict[str, Any]:
    """`{csv: path, option: …}`, `{load: data.py, …}` or `{digits: {}}` -> the long form."""
    also = {"per_host": value["per_host"]} if "per_host" in value else {}
    rest = {key: value[key] for key in value if key not in also}
    kinds = [kind for kind in (*READERS, LOAD) if kind in rest]
    if len(kinds) > 1:
        raise mistake(f"expected one kind of data, found {', '.join(kinds)}", "name one of them")
    for kind in kinds:
        text = rest.pop(kind)
        if not isinstance(text, str):
            raise mistake(f"expected a path, found {show(text)}", "", (kind,))
        return {**(_load(text, rest) if kind == LOAD else _read(kind, text, rest)), **also}
    built_in: Table = {**DATASETS, **READERS}
    name, options = choice(built_in, rest, "data")
    return {"kind": "builtin", "name": name, "options": options, **also}


def _read(reader: str, path: str, options: Mapping[str, object]) -> dict[str, Any]:
    """What one of the readers reads."""
    printable(path)
    on_host = path.startswith(ON_HOST)
    if on_host and not path.startswith(f"{ON_HOST}/"):
        raise mistake(f"{show(path)} is not absolute", "write host:/path")
    for key in options.keys() - READERS[reader].model_fields.keys():
        if get_close_matches(key, Source.model_fields):  # which is no option of the reader's
            hint = did_you_mean(key, Source.model_fields)
            raise mistake(f"unknown key {show(key)}", hint, (key,), key=True)
    complete = checked(READERS, reader, options, ())
    path = path.removeprefix(ON_HOST)
    return {"kind": reader, "path": path, "on_host": on_host, "options": complete}


def _load(text: str, rest: Mapping[str, object]) -> dict[str, Any]:
    """A file or a module of the user's with a function `load`."""
    for other in rest:
        hint = did_you_mean(other, [LOAD, *Source.model_fields])
        raise mistake(f"unknown key {show(other)}", hint, (other,), key=True)
    if text.isidentifier():
        raise mistake(f"{show(text)} is not a file or a module", "write path/to/data.py", (LOAD,))
    return _reference(text, {}, MODEL_SUFFIXES, "data")
