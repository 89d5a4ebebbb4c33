"""From YAML and `--set` to a specification, or to all mistakes at once.

The text becomes a tree of nodes with places (`nodes`), overrides are laid over it, ranges of hosts
are expanded, and the models of `contract.spec` judge the result. Every finding is brought back to
its line and column and printed once: `file:line:column  what – suggestion`, and a caret below.
Only SpecError leaves this file.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from dsgd_cli.contract.errors import SpecError
from dsgd_cli.contract.mistakes import Mistake, explain, show
from dsgd_cli.contract.mistakes import Path as TreePath
from dsgd_cli.contract.options import (
    ALGORITHMS,
    CHANNELS,
    DATASETS,
    FOLDERS,
    MODELS,
    OPTIMIZERS,
    READERS,
)
from dsgd_cli.contract.spec import MAX_HOSTS, ClusterSpec
from dsgd_cli.launcher import hosts, placement, sense
from dsgd_cli.launcher.nodes import (
    MAX_BYTES,
    Node,
    Parsed,
    Place,
    Problem,
    Source,
    parse,
    scalars,
    surprise,
)

# Before it builds its first model (here: at the first validation) pydantic looks for plugins in
# every installed distribution: 20 ms in a small environment, more in a large one. dsgd has none.
_NO_PLUGINS = ModuleType("pydantic.plugin._loader")
vars(_NO_PLUGINS)["get_plugins"] = tuple
sys.modules.setdefault(_NO_PLUGINS.__name__, _NO_PLUGINS)

MAX_SHOWN = 100  # mistakes; who has more wants to see the first ones
WIDTH = 100  # of the line shown above a caret
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")
_CHOICES: dict[tuple[str | int, ...], Mapping[str, object]] = {
    ("channel",): CHANNELS,
    ("train", "model"): MODELS,
    ("train", "data"): {**DATASETS, **READERS},
    ("train", "algorithm"): ALGORITHMS,
    ("train", "optimizer"): OPTIMIZERS,
}
_RESTS_ON: dict[str | int, tuple[str, ...]] = {
    "servers": ("hosts",),
    "workers": ("hosts",),
    "train": ("workers",),
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A specification that holds, what the reader should know of it, and where its paths start."""

    spec: ClusterSpec
    notes: tuple[str, ...]
    base_dir: Path


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Loaded:
    """Read a cluster description; `overrides` are `key=value` as after `--set`."""
    file = Path(path)
    label = _clean(str(path))
    text = _read(file, label)
    parsed = parse(text, Source(label, tuple(text.splitlines())))
    if parsed.root is None and not parsed.problems:
        hint = "`dsgd init` writes one to start from"
        parsed.problems.append(
            Problem(Place(Source(label, ()), 0, 0, 1), "the file is empty", hint)
        )
        parsed.broken = True
    return _finish(parsed, overrides, label, file.absolute().parent)


def local_spec(
    shape: str, model: str = "mlp", data: str = "digits", overrides: Sequence[str] = ()
) -> Loaded:
    """`1x2`: one server and two workers on this machine; there is no file."""
    match = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", shape.strip())
    if match is None:
        raise SpecError(
            f"--local {show(shape)}: expected servers x workers", remedy="write --local 1x2"
        )
    source = Source("--local", (f"{{name: local, servers: {match[1]}, workers: {match[2]}}}",))
    parsed = parse(source.lines[0], source)
    extra = [f"train.model={model}", f"train.data={data}"]
    return _finish(parsed, [*extra, *overrides], "the arguments", Path.cwd())


def _finish(parsed: Parsed, overrides: Sequence[str], label: str, base_dir: Path) -> Loaded:
    problems = list(parsed.problems)
    root = parsed.root
    hurt: set[str] = set()
    spec = None
    if not parsed.broken and root is not None and root.mapping is None:
        what = "a list" if root.sequence is not None else show(root.scalar)
        hint = "`dsgd init` writes a file to start from"
        problems.append(Problem(root.place, f"expected fields, found {what}", hint))
    elif not parsed.broken:
        root = root or Node(Place(Source(label, ()), 0, 0, 1), mapping={})
        for expression in overrides:
            problems += _override(root, expression)
        hurt |= _hurt(problems, root)
        problems += _expand_hosts(root, hurt)
        spec = _validate(root, problems, hurt)
    if spec is not None and root is not None:
        spec = hosts.with_defaults(_with_paths(spec, root, base_dir))
        problems += [_place(root, m) for m in _cross(spec) if not _touches(m, hurt)]
    if problems or spec is None or root is None:
        raise _error(problems, label)
    return Loaded(spec, (*_notes(root), *_doubts(root, spec)), base_dir)


# ── reading ────────────────────────────────────────────────────────────────────────────────────


def _read(file: Path, label: str) -> str:
    """The text of a file that can be YAML at all."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        remedy = "dsgd init writes one to start from"
        raise SpecError(f"{label}: no such file", remedy=remedy) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise SpecError(f"{label}: {reason[:1].lower()}{reason[1:]}") from None
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{label}: larger than {MAX_BYTES // 1_000_000} MB: not a description")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", "replace")
        raise _unreadable(
            before, label, f"not UTF-8 text (byte 0x{raw[error.start]:02x})"
        ) from None
    bad = _UNPRINTABLE.search(text)
    if bad is not None:
        what = f"a control character (0x{ord(bad[0]):02x})"
        raise _unreadable(text[: bad.start()], label, what)
    return text


def _unreadable(before: str, label: str, what: str) -> SpecError:
    lines = (before + ".").splitlines()  # the dot stands for what cannot be read
    source = Source(label, (*lines[:-1], lines[-1][:-1]))
    place = Place(source, len(lines) - 1, len(lines[-1]) - 1, len(lines[-1]))
    return _error([Problem(place, what, "save the file as plain UTF-8 text")], label)


# ── --set ──────────────────────────────────────────────────────────────────────────────────────


def _override(root: Node, expression: str) -> list[Problem]:
    """Lay `a.b=value` over the tree; what is wrong is placed in the expression."""
    label = f"--set {_clean(expression)}"
    source = Source(label, (_clean(expression),))
    key, equals, value = expression.partition("=")
    whole = Place(source, 0, 0, max(1, len(expression)))
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        return [Problem(whole, "not an override", "write --set key=value, such as servers=2")]
    bad = _UNPRINTABLE.search(expression)
    if bad is not None:
        return [Problem(whole, "a control character", "write plain text")]
    lines = tuple(value.splitlines())
    shift = len(key) + 1
    shown = (f"{_clean(key)}={lines[0]}", *lines[1:]) if lines else (f"{_clean(key)}=",)
    parsed = parse(value, Source(label, shown, shift))
    if parsed.problems:
        return parsed.problems
    node = parsed.root or Node(Place(source, 0, shift, shift + 1), text="", plain=True)
    places = []
    column = 0
    for part in key.split("."):
        places.append(Place(source, 0, column, column + max(1, len(part))))
        column += len(part) + 1
    return _descend(root, parts, places, node)


def _descend(root: Node, parts: list[str], places: list[Place], value: Node) -> list[Problem]:
    here = root
    for depth, (part, place) in enumerate(zip(parts, places, strict=True)):
        last = depth == len(parts) - 1
        path = tuple(parts[:depth])
        _open(here, path, part)
        if here.sequence is not None:
            if not part.isdecimal() or len(part) > 9 or int(part) >= len(here.sequence):
                count = len(here.sequence)
                what = f"{show('.'.join(path))} has no element {show(part)}"
                return [Problem(place, what, f"it has {count}, counted from 0")]
            if last:
                here.sequence[int(part)] = value
            else:
                here = here.sequence[int(part)]
            continue
        entries = here.mapping
        assert entries is not None  # _open made it a mapping
        if last:
            entries[part] = (place, value)
        else:
            if part not in entries:
                entries[part] = (place, Node(place, mapping={}))
            here = entries[part][1]
    return []


def _open(node: Node, path: tuple[str, ...], part: str) -> None:
    """Turn a short form into the mapping that `part` can be set in."""
    table = _CHOICES.get(tuple(path))
    if node.mapping is not None:
        if table is not None and part in table and part not in node.mapping:
            node.mapping.clear()  # another choice replaces the one that was made
        return
    if node.sequence is not None and (part.isdecimal() or path in (("hosts",), ("workers", "on"))):
        return
    short = replace(node)
    node.sequence, node.mapping, node.scalar, node.text = None, {}, None, ""
    if path == ("hosts",) and part.isdecimal() and short.text:
        node.mapping, node.sequence = None, [short]
        return
    if short.sequence is not None or short.text == "":
        return
    key = "count" if path in (("servers",), ("workers",)) else None
    if len(path) == 2 and path[0] == "hosts":
        key = "address"
    if key is not None and part != key:
        node.mapping[key] = (short.place, short)
    if table is not None and short.text in table and (part == short.text or part not in table):
        node.mapping[short.text] = (short.place, Node(short.place, mapping={}))


# ── ranges of hosts ────────────────────────────────────────────────────────────────────────────


def _expand_hosts(root: Node, hurt: set[str]) -> list[Problem]:
    """Replace each range under `hosts` by one node for each host; all keep the range's place."""
    entries = root.mapping or {}
    if "hosts" not in entries:
        return []
    at, listed = entries["hosts"]
    items = listed.sequence if listed.sequence is not None else [listed]
    if listed.sequence is None and listed.mapping is None and not isinstance(listed.scalar, str):
        return []  # not a list of hosts: the models say so
    expanded: list[Node] = []
    problems: list[Problem] = []
    for item in items:
        try:
            expanded += _expand(item)
        except _BadRange as bad:
            problems.append(bad.problem)
        if len(expanded) > MAX_HOSTS:
            problems.append(Problem(item.place, f"more than {MAX_HOSTS} hosts", "list fewer"))
            break
    if problems:
        hurt.add("hosts")
    if expanded or not problems:
        entries["hosts"] = (at, Node(listed.place, sequence=expanded))
    else:
        del entries["hosts"]
    return problems


class _BadRange(Exception):
    def __init__(self, place: Place, error: ValueError) -> None:
        super().__init__()
        self.problem = Problem(place, *error.args)


def _range(node: Node) -> list[str]:
    try:
        return hosts.expand(node.text)
    except ValueError as error:
        raise _BadRange(node.place, error) from None


def _expand(item: Node) -> list[Node]:
    if isinstance(item.scalar, str):
        return [replace(item, scalar=text, text=text) for text in _range(item)]
    ranged = {
        key: (at, node, _range(node))
        for key, (at, node) in (item.mapping or {}).items()
        if key in ("name", "address") and isinstance(node.scalar, str)
    }
    sizes = {key: len(texts) for key, (_, _, texts) in ranged.items()}
    count = max(sizes.values(), default=1)
    if count == 1:
        return [item]
    if len(set(sizes.values())) > 1:
        wrong = min(sizes, key=lambda key: sizes[key])
        what = f"{count} hosts, but {sizes[wrong]} in {wrong!r}"
        hint = f"give {wrong!r} a range of {count}, or leave it out"
        raise _BadRange(ranged[wrong][1].place, ValueError(what, hint))
    copies = []
    for index in range(count):
        changed = {
            key: (at, replace(node, scalar=texts[index], text=texts[index]))
            for key, (at, node, texts) in ranged.items()
        }
        copies.append(Node(item.place, mapping={**(item.mapping or {}), **changed}))
    return copies


# ── validation ─────────────────────────────────────────────────────────────────────────────────


def _validate(root: Node, problems: list[Problem], hurt: set[str]) -> ClusterSpec | None:
    """The tree's verdict; after mistakes, once more without what was wrong, for further checks."""
    data = _plain(root, ())
    try:
        return ClusterSpec.model_validate(data)
    except ValidationError as error:
        found = explain(ClusterSpec, error)
    problems += [_place(root, mistake) for mistake in found]
    hurt |= {str(mistake.path[0]) for mistake in found if mistake.path}
    for field in hurt:
        data.pop(field, None)
    try:
        return ClusterSpec.model_validate(data)
    except ValidationError:
        return None


def _plain(node: Node, path: TreePath) -> Any:
    """Nodes to plain data; the values of environment variables stay the text that was written."""
    if node.mapping is not None:
        return {key: _plain(value, (*path, key)) for key, (_, value) in node.mapping.items()}
    if node.sequence is not None:
        return [_plain(item, (*path, 0)) for item in node.sequence]
    if len(path) == 3 and path[:2] == ("workers", "env"):
        return node.text
    return node.scalar


def _place(root: Node, mistake: Mistake) -> Problem:
    """Where a path of the tree was written; what the text does not spell out is its parent."""
    here, place = root, root.place
    for position, part in enumerate(mistake.path):
        last = position == len(mistake.path) - 1
        if here.mapping is not None and isinstance(part, str) and part in here.mapping:
            at, here = here.mapping[part]
            place = at if last and mistake.key else here.place
        elif here.sequence is not None and isinstance(part, int) and part < len(here.sequence):
            here = here.sequence[part]
            place = here.place
        elif here.mapping is not None and len(here.mapping) == 1 and not last:
            inner = next(iter(here.mapping.values()))[1]
            if inner.mapping is not None and mistake.path[position + 1] in inner.mapping:
                here = inner
    return Problem(place, mistake.what, mistake.hint)


def _hurt(problems: Iterable[Problem], root: Node) -> set[str]:
    """The top-level fields in which something was refused: nothing is derived from them."""
    hurt = set(root.lost)
    starts = [(at.source.label, at[1:3], key) for key, (at, _) in (root.mapping or {}).items()]
    for problem in problems:
        place = problem.place
        before = [
            (start, key)
            for label, start, key in starts
            if label == place.source.label and start <= place[1:3]
        ]
        if before:
            hurt.add(max(before)[1])
    return hurt


def _cross(spec: ClusterSpec) -> Iterator[Mistake]:
    """What fields say about each other."""
    yield from hosts.mistakes(spec)
    yield from placement.mistakes(spec)
    yield from sense.mistakes(spec)
    yield from _missing(spec)


def _touches(mistake: Mistake, hurt: set[str]) -> bool:
    """Whether a cross-check rests on a field that is wrong already."""
    field = mistake.path[0]
    rests_on = {field, *_RESTS_ON.get(field, ())}
    return not hurt.isdisjoint(map(str, rests_on))


# ── files ──────────────────────────────────────────────────────────────────────────────────────


def _with_paths(spec: ClusterSpec, root: Node, base_dir: Path) -> ClusterSpec:
    """All paths on this machine made absolute: in YAML from its folder, in `--set` from here."""

    def absolute(path: str, *at: str | int) -> str:
        label = _place(root, Mistake(at, "")).place.source.label
        base = Path.cwd() if label.startswith("--") else base_dir
        return os.path.normpath(base / os.path.expanduser(path))  # noqa: PTH111 - never raises

    def key(path: str | None, *at: str | int) -> dict[str, str]:
        return {"identity_file": absolute(path, *at, "identity_file")} if path else {}

    machines = tuple(
        host.model_copy(update=key(host.identity_file, "hosts", index))
        if host.identity_file
        else host
        for index, host in enumerate(spec.hosts)
    )
    model, data = spec.train.model, spec.train.data
    if model.path and not model.on_host:
        model = model.model_copy(update={"path": absolute(model.path, "train", "model")})
    if data.path and not data.on_host:
        data = data.model_copy(update={"path": absolute(data.path, "train", "data")})
    train = spec.train.model_copy(update={"model": model, "data": data})
    ssh = spec.ssh.model_copy(update=key(spec.ssh.identity_file, "ssh"))
    env = spec.env
    if env.requirements:
        listed = absolute(env.requirements, "env", "requirements")
        env = env.model_copy(update={"requirements": listed})
    return spec.model_copy(update={"hosts": machines, "ssh": ssh, "env": env, "train": train})


def _missing(spec: ClusterSpec) -> Iterator[Mistake]:
    """The user's own files that are not there, or cannot be read."""
    for name, ref in (("model", spec.train.model), ("data", spec.train.data)):
        if ref.path and not ref.on_host:
            yield from _missing_file(
                ref.path, ("train", name, ref.kind), folder=ref.kind in FOLDERS
            )
    if spec.env.requirements:
        yield from _missing_file(spec.env.requirements, ("env", "requirements"), folder=False)


def _missing_file(path: str, at: TreePath, *, folder: bool) -> Iterator[Mistake]:
    why = _unusable(Path(path), folder=folder)
    if why:
        yield Mistake(at, f"{show(path, 200)}: {why}", "a path in the file starts at its folder")


def _unusable(path: Path, *, folder: bool) -> str:
    try:
        if folder:
            next(path.iterdir(), None)
        elif path.is_dir():
            return "is a folder, not a file"
        elif path.exists() and not path.is_file():
            return "is not a regular file"  # a pipe would be waited for
        else:
            path.open("rb").close()
        return ""
    except FileNotFoundError:
        return "no such folder" if folder else "no such file"
    except NotADirectoryError:
        return "is a file, not a folder" if path.is_file() else "no such file"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return reason.lower()


# ── words ──────────────────────────────────────────────────────────────────────────────────────


def _notes(root: Node) -> Iterator[str]:
    """One line for each value of the file that YAML 1.1 would have read differently."""
    workers = (root.mapping or {}).get("workers")
    env = ((workers[1].mapping or {}) if workers else {}).get("env")
    as_text = {node.place for node in scalars(env[1])} if env else set()
    for node in scalars(root):
        what = surprise(node)
        if what and node.place not in as_text and not node.place.source.label.startswith("--"):
            place = node.place
            yield f"{_at(place)}  {show(node.text)} is {what}"


def _doubts(root: Node, spec: ClusterSpec) -> Iterator[str]:
    """One line for each thing that is allowed and odd."""
    for doubt in sense.doubts(spec):
        place = _place(root, doubt).place
        yield f"{_at(place)}  {doubt.what} – {doubt.hint}"


def _error(problems: Iterable[Problem], label: str) -> SpecError:
    """All problems as one error: in the order of the text, one for each place."""
    first: dict[tuple[str, int, int], Problem] = {}
    for problem in problems:
        place = problem.place
        first.setdefault((place.source.label, place.line, place.column), problem)
    ordered = sorted(first.items(), key=lambda item: (item[0][0].startswith("--"), item[0]))
    details: list[str] = []
    for _, problem in ordered[:MAX_SHOWN]:
        details += _rendered(problem)
    count = len(ordered)
    if count > MAX_SHOWN:
        details.append(f"… and {count - MAX_SHOWN} more")
    return SpecError(f"{count} error{'s' if count != 1 else ''} in {label}", details=details)


def _at(place: Place) -> str:
    return f"{place.source.label}:{place.line + 1}:{place.column + 1}"


def _rendered(problem: Problem) -> list[str]:
    """The line `file:line:column  what – suggestion`, the text, and a caret below it."""
    place = problem.place
    said = f"{problem.what} – {problem.hint}" if problem.hint else problem.what
    lines = [f"{_at(place)}  {said}"]
    if place.line < len(place.source.lines):
        text = place.source.lines[place.line]
        start = max(0, min(place.column - WIDTH // 2, len(text) - WIDTH))
        shown = _clean(text[start : start + WIDTH])
        column = place.column - start
        carets = max(1, min(place.end, start + len(shown)) - place.column)
        lines += [
            f"{place.line + 1:>5} | {shown}".rstrip(),
            f"      | {' ' * column}{'^' * carets}",
        ]
    return lines


def _clean(text: str) -> str:
    """The same text, as long, with nothing in it that moves a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in text)
