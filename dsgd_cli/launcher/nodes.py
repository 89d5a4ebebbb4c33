"""YAML as a tree in which every key and value knows its place.

Built from parser events, not by PyYAML's constructor, so that a mistake has a line and a column,
all mistakes of a file are found at once, and nothing is resolved that was not meant: scalars are
read as YAML 1.2 does (`1e-3` is a number, `022` is 22, `on` and `no` are text), and what
dsgd does not want (aliases, anchors, tags, duplicate keys, several documents, great depth or size)
is refused here. A refused value is left out of the tree, so that it causes no second mistake.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from dsgd_cli.contract.mistakes import show

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 50_000
MAX_DIGITS = 300

# libyaml when PyYAML was built with it: an order of magnitude faster.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Source:
    """Where text comes from: a file, or one `--set`; `shift`: columns before its first line."""

    label: str
    lines: tuple[str, ...]
    shift: int = 0


class Place(NamedTuple):
    """A stretch of one line; counted from 0."""

    source: Source
    line: int
    column: int
    end: int


class Problem(NamedTuple):
    """A mistake and where it is."""

    place: Place
    what: str
    hint: str = ""


@dataclass(slots=True)
class Node:
    """A value: `scalar`, `mapping` (key -> place of the key, value) or `sequence`."""

    place: Place
    scalar: Any = None
    text: str = ""  # of a scalar, as written
    plain: bool = False  # a scalar without quotes
    mapping: dict[str, tuple[Place, Node]] | None = None
    sequence: list[Node] | None = None
    lost: set[str] = field(default_factory=set)  # keys of a mapping whose values were refused


@dataclass(slots=True)
class Parsed:
    """The tree (None: nothing there), and what is wrong so far; `broken`: it is not complete."""

    root: Node | None = None
    problems: list[Problem] = field(default_factory=list)
    broken: bool = False


def parse(text: str, source: Source) -> Parsed:
    """Text to a tree. Never raises; a syntax error ends the tree where it stands."""
    parsed = Parsed()
    reader = _Reader(text, source, parsed)
    try:
        reader.document()
    except yaml.YAMLError as error:
        parsed.broken = True
        parsed.problems.append(reader.syntax(error))
    except _Refused as refused:
        parsed.broken = True
        parsed.problems.append(refused.problem)
    finally:
        reader.close()
    return parsed


class _Refused(Exception):
    """Something after which the rest is not worth reading."""

    def __init__(self, place: Place, what: str, hint: str) -> None:
        super().__init__(what)
        self.problem = Problem(place, what, hint)


class _Reader:
    """Events to nodes: one pass, no recursion deeper than MAX_DEPTH."""

    def __init__(self, text: str, source: Source, parsed: Parsed) -> None:
        self._loader = LOADER(text)
        self._source = source
        self._parsed = parsed
        self._anchors: dict[str, Place] = {}
        self._used: set[str] = set()
        self._count = 0

    def close(self) -> None:
        self._loader.dispose()

    def document(self) -> None:
        next_event = self._loader.get_event
        next_event()  # stream start
        event = next_event()
        if isinstance(event, yaml.StreamEndEvent):
            return
        self._parsed.root = self._value(next_event(), 1)
        next_event()  # document end
        event = next_event()
        if not isinstance(event, yaml.StreamEndEvent):
            what = "a second document"
            raise _Refused(self._place(event), what, "one cluster is one document: remove '---'")
        for name, place in self._anchors.items():
            if name not in self._used:
                self._wrong(place, f"anchor {show('&' + name)}", "remove it, dsgd takes no aliases")

    def syntax(self, error: yaml.YAMLError) -> Problem:
        """A syntax error in plain words."""
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        problem = str(getattr(error, "problem", None) or "not readable")
        line, column = (mark.line, mark.column) if mark is not None else (0, 0)
        lines = self._source.lines
        column += self._source.shift if line == 0 else 0
        if line >= len(lines) and lines:  # the end of the text: point behind its last character
            line, column = len(lines) - 1, len(lines[-1])
        if "alphabetic or numeric" in problem and lines[line][column - 1 : column] in ("*", "&"):
            column -= 1
        place = Place(self._source, line, column, column + 1)
        rest = lines[line][column:] if line < len(lines) else ""
        return Problem(place, *_syntax_words(problem, rest))

    def _value(self, event: Any, depth: int) -> Node | None:
        """The node that begins with this event; None when it was refused."""
        place = self._place(event)
        self._count += 1
        if self._count > MAX_NODES:
            raise _Refused(place, f"more than {MAX_NODES} values", "use ranges such as gpu[1-100]")
        if isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            self._used.add(name)
            what = f"alias {show('*' + name)}"
            self._wrong(place, what, "write the value out, or put it in quotes if it is text")
            return None
        if depth > MAX_DEPTH:
            raise _Refused(place, f"nested deeper than {MAX_DEPTH}", "dsgd needs no such depth")
        anchor, tag = event.anchor, event.tag
        if anchor is not None:
            self._anchors.setdefault(anchor, place._replace(end=place.column + len(anchor) + 1))
        if isinstance(event, yaml.ScalarEvent):
            node: Node | None = self._scalar(event, place)
        elif isinstance(event, yaml.MappingStartEvent):
            node = self._mapping(place, depth)
        else:
            node = self._sequence(place, depth)
        if tag is not None:
            self._wrong(place, f"tag {show(tag)}", "remove it, dsgd takes plain values only")
            return None
        return node

    def _scalar(self, event: Any, place: Place) -> Node:
        text = event.value
        plain = event.style in (None, "")
        return Node(place, resolve(text) if plain else text, text, plain)

    def _mapping(self, place: Place, depth: int) -> Node:
        entries: dict[str, tuple[Place, Node]] = {}
        node = Node(place, mapping=entries)
        seen: dict[str, Place] = {}
        while not isinstance(event := self._loader.get_event(), yaml.MappingEndEvent):
            at = self._place(event)
            key = self._value(event, depth + 1)
            value = self._value(self._loader.get_event(), depth + 1)
            if key is None:
                continue  # refused already
            if key.mapping is not None or key.sequence is not None:
                self._wrong(at, "a key that is not text", "write `key: value`")
            elif key.text in seen:
                first = seen[key.text].line + 1
                node.lost.add(key.text)
                what = f"duplicate key {show(key.text)} (first at line {first})"
                self._wrong(at, what, "remove one; YAML would silently keep the last")
            else:
                seen[key.text] = at
                if value is not None:
                    entries[key.text] = (at, value)
                else:
                    node.lost.add(key.text)
        return node

    def _sequence(self, place: Place, depth: int) -> Node:
        items: list[Node] = []
        while not isinstance(event := self._loader.get_event(), yaml.SequenceEndEvent):
            item = self._value(event, depth + 1)
            if item is not None:
                items.append(item)
        return Node(place, sequence=items)

    def _place(self, event: Any) -> Place:
        start, end = event.start_mark, event.end_mark
        line, column, stop = start.line, start.column, end.column
        if end.line != line or stop <= column:
            lines = self._source.lines
            stop = max(len(lines[line]) if line < len(lines) else 0, column + 1)
        shift = self._source.shift if line == 0 else 0
        return Place(self._source, line, column + shift, stop + shift)

    def _wrong(self, place: Place, what: str, hint: str) -> None:
        self._parsed.problems.append(Problem(place, what, hint))


# ── scalars ────────────────────────────────────────────────────────────────────────────────────

_WORDS: dict[str, Any] = {
    "": None,
    "~": None,
    **dict.fromkeys(("null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **{sign + word: math.inf for sign in ("", "+") for word in (".inf", ".Inf", ".INF")},
    **{"-" + word: -math.inf for word in (".inf", ".Inf", ".INF")},
}
_NUMBER_STARTS = frozenset("+-.0123456789")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_BASED = r"0(o[0-7]+|x[0-9a-fA-F]+)"


def resolve(text: str) -> Any:
    """The value of a plain scalar in YAML 1.2 (core schema)."""
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _NUMBER_STARTS or len(text) > MAX_DIGITS:
        return text
    if _INT.fullmatch(text):
        return int(text)
    if re.fullmatch(_FLOAT, text):
        return float(text)
    if re.fullmatch(_BASED, text):
        return int(text[2:], 8 if text[1] == "o" else 16)
    return text


_SURPRISING_WORDS = {
    **dict.fromkeys(("yes", "Yes", "YES", "on", "On", "ON"), "true"),
    **dict.fromkeys(("no", "No", "NO", "off", "Off", "OFF"), "false"),
}


def surprise(node: Node) -> str:
    """What YAML 1.1 would have made of a plain scalar, if that differs from what we read."""
    text = node.text
    if not node.plain or not text or len(text) > MAX_DIGITS:
        return ""
    if text in _SURPRISING_WORDS:
        return f"{_SURPRISING_WORDS[text]} in YAML 1.1 – read as text"
    if text[0] not in _NUMBER_STARTS or (text.isdecimal() and text[0] != "0"):
        return ""
    if re.fullmatch(r"[-+]?0[0-7]+", text):
        return f"{int(text, 8)} in YAML 1.1 – read as the number {node.scalar}"
    if isinstance(node.scalar, float) and not re.fullmatch(
        r"[-+]?(([0-9]+\.[0-9]*([eE][-+][0-9]+)?)|(\.[0-9]+)|(\.(inf|nan)))", text, re.IGNORECASE
    ):
        return f"text in YAML 1.1 – read as the number {node.scalar:g}"
    if text.startswith("0o") and isinstance(node.scalar, int):
        return f"text in YAML 1.1 – read as the number {node.scalar}"
    if isinstance(node.scalar, str) and re.fullmatch(
        r"[-+]?([1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*|0b[01_]+)", text
    ):
        return "a number in YAML 1.1 – read as text"
    return ""


# ── words ──────────────────────────────────────────────────────────────────────────────────────


def _syntax_words(problem: str, rest: str) -> tuple[str, str]:
    """What the parser says, as what to do about it. Both of PyYAML's parsers are covered."""
    if rest.startswith("\t"):
        return "a tab", "indent with spaces"
    if rest.startswith("[") and ("',' or ']'" in problem or "',' or '}'" in problem):
        return "a '[' inside a list", 'put the range in quotes: "gpu[1-4]"'
    if "mapping values are not allowed" in problem:
        return "a second ':' on one line", "put the text in quotes, or start a new line"
    if "could not find expected ':'" in problem:
        return "a key without ':'", "write `key: value`"
    if "alphabetic or numeric character" in problem:
        return "'*' and '&' have a meaning in YAML", "put the text in quotes"
    if "cannot start any token" in problem:
        return f"{show(rest[:1])} cannot start a value", "put the text in quotes"
    if "node content" in problem:
        return "a value is missing here", "write it, or put text in quotes"
    if "quoted scalar" in problem or "unexpected end of stream" in problem:
        return "a quote that is never closed", "close it"
    if "',' or ']'" in problem:
        return "a list that is never closed, or a missing comma", "close it with ']'"
    if "',' or '}'" in problem:
        return "a mapping that is never closed, or a missing comma", "close it with '}'"
    if "block end" in problem or "block mapping" in problem or "block collection" in problem:
        return "the indentation does not fit", "align it with the line above"
    return f"not YAML: {show(problem, 100)[1:-1]}", ""


def scalars(node: Node) -> Iterator[Node]:
    """All scalars below a node, in order."""
    stack = [node]
    while stack:
        here = stack.pop()
        if here.mapping is not None:
            stack += [value for _, value in reversed(here.mapping.values())]
        elif here.sequence is not None:
            stack += reversed(here.sequence)
        else:
            yield here
