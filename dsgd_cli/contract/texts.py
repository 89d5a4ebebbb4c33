"""The kinds of text and of duration that a description is made of, and the base of its nodes."""

# No `from __future__ import annotations`: pydantic would compile each annotation once more.

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import core_schema

from dsgd_cli.contract import names
from dsgd_cli.contract.durations import format_duration, parse_duration
from dsgd_cli.contract.mistakes import mistake, show
from dsgd_cli.contract.values import FROZEN

ADDRESS = re.compile(
    r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?|[0-9a-fA-F:.]{2,45}(%[A-Za-z0-9_]{1,15})?"
)
HOST_NAME = r"[A-Za-z0-9][A-Za-z0-9._:%-]{0,252}"
USER = r"[A-Za-z0-9_][A-Za-z0-9_.@$+\\-]{0,63}"
PYTHON = r"[A-Za-z0-9._/+][A-Za-z0-9._/+-]{0,254}"
HOST_KEY = r"SHA256:[A-Za-z0-9+/]{43}=?"
ENV_NAME = r"[A-Za-z_][A-Za-z0-9_]{0,254}"
DURATION = r"^([0-9]+(\.[0-9]+)? *(ms|s|m|h|d) *)+$"  # for editors; `parse_duration` decides


class Tree(BaseModel):
    """Base of the tree's nodes: frozen, nothing unknown."""

    model_config = FROZEN


def _matching(pattern: str, what: str, hint: str) -> AfterValidator:
    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            if text.startswith("-"):
                raise mistake(f"{show(text)} is not {what}", "it must not start with '-'")
            raise mistake(f"{show(text)} is not {what}", hint)
        return text

    return AfterValidator(check)


def printable(text: str) -> str:
    if not text.strip():
        raise mistake("empty text", "give it a value, or remove the line")
    if len(text) > 4096:
        raise mistake(f"{show(text)} is too long", "4096 characters at most")
    if not text.isprintable():
        raise mistake(f"{show(text)} has control characters", "write plain text on one line")
    return text


def _cluster_name(text: str) -> str:
    if names.NAME.fullmatch(text) is None:
        near = re.sub(r"[^a-z0-9]+", "-", text.lower())[:63].strip("-")
        other = f", such as '{near}'" if near else ""
        raise mistake(f"{show(text)} is not a name", f"use a-z, 0-9 and '-'{other}")
    return text


def _address(text: str) -> str:
    if ADDRESS.fullmatch(text) is not None and ".." not in text:
        return text
    what = f"{show(text)} is not an address"
    user, at, rest = text.rpartition("@")
    if at and re.fullmatch(USER, user) and ADDRESS.fullmatch(rest):
        raise mistake(what, f"write {{address: {rest}, user: {user}}}")
    host, colon, port = text.rpartition(":")
    if colon and port.isdigit() and ADDRESS.fullmatch(host):
        raise mistake(what, f"write {{address: {host}, port: {port[:5]}}}")
    if text.startswith("-"):
        raise mistake(what, "it must not start with '-'")
    raise mistake(what, "write a host name or an IP address")


class Seconds:
    """A duration within bounds, written `15s` or as a number; marks its fields as durations."""

    def __init__(self, low_s: float, high_s: float) -> None:
        self.low_s = low_s
        self.high_s = high_s

    def check(self, value: object) -> object:
        seconds = value
        if isinstance(value, str):
            try:
                seconds = parse_duration(value)
            except ValueError as why:
                raise mistake(f"{show(value)} is not a duration", str(why)) from None
        if value is None:
            return value
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            raise mistake(f"expected a duration, found {show(value)}", "write 15s, 10m or 1h")
        if not self.low_s <= seconds <= self.high_s:
            low, high = format_duration(self.low_s), format_duration(self.high_s)
            raise mistake(f"{show(value)} is out of range", f"it must be between {low} and {high}")
        return float(seconds)

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        number = {"type": "number", "minimum": self.low_s, "maximum": self.high_s}
        return {"anyOf": [number, {"type": "string", "pattern": DURATION}]}


Text = Annotated[str, AfterValidator(printable)]
Name = Annotated[str, AfterValidator(_cluster_name)]
Address = Annotated[str, AfterValidator(_address)]
HostName = Annotated[str, _matching(HOST_NAME, "a host's name", "use letters, digits, '.' and '-'")]
User = Annotated[str, _matching(USER, "a user name", "use letters, digits, '.', '_' and '-'")]
Python = Annotated[
    str, _matching(PYTHON, "a path of python", "write python3 or a path such as /usr/bin/python3")
]
HostKey = Annotated[
    str,
    _matching(HOST_KEY, "a host key", "write SHA256:… as `ssh-keygen -lf` prints it"),
]
Port = Annotated[int, Field(strict=True, ge=1, le=65_535)]
