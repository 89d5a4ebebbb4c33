"""Event files, read back by a reader of our own that believes nothing without its checksum."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dsgd_cli.reporting.tensorboard import EventFile, crc32c, event
from tests.reporting.runs import epoch, evaluate, report


@dataclass
class Event:
    wall_s: float
    step: int
    version: str = ""
    tag: str = ""
    value: float | None = None


def bitwise_crc32c(data: bytes) -> int:
    """The definition: division of polynomials, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def unmasked(raw: bytes) -> int:
    turned: int = (struct.unpack("<I", raw)[0] - 0xA282EAD8) & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF


def frames(raw: bytes) -> Iterator[bytes]:
    """The payloads of a TFRecord file."""
    at = 0
    while at < len(raw):
        head, crc = raw[at : at + 8], raw[at + 8 : at + 12]
        assert unmasked(crc) == bitwise_crc32c(head)
        (size,) = struct.unpack("<Q", head)
        data, crc = raw[at + 12 : at + 12 + size], raw[at + 12 + size : at + 16 + size]
        assert len(data) == size
        assert unmasked(crc) == bitwise_crc32c(data)
        yield data
        at += 16 + size


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        at, shift, last = at + 1, shift + 7, data[at] < 0x80
        if last:
            return value, at


def fields(data: bytes) -> dict[int, Any]:
    """field number -> value of a protobuf message."""
    found: dict[int, Any] = {}
    at = 0
    while at < len(data):
        key, at = varint(data, at)
        kind = key & 7
        if kind == 0:
            found[key >> 3], at = varint(data, at)
        elif kind == 2:
            size, at = varint(data, at)
            found[key >> 3], at = data[at : at + size], at + size
        else:
            size, code = {1: (8, "<d"), 5: (4, "<f")}[kind]
            (found[key >> 3],), at = struct.unpack(code, data[at : at + size]), at + size
    return found


def parsed(data: bytes) -> Event:
    """An event as tensorflow/core/util/event.proto has it."""
    top = fields(data)
    known = Event(top[1], top[2], top.get(3, b"").decode())
    if 5 in top:
        scalar = fields(fields(top[5])[1])
        known.tag, known.value = scalar[1].decode(), scalar[2]
    return known


def read(path: Path) -> list[Event]:
    return [parsed(data) for data in frames(path.read_bytes())]


def test_the_checksum_is_castagnolis() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720 and every table of checksums
    assert crc32c(bytes(32)) == 0x8A9136AA


@given(st.binary(max_size=50))
def test_the_table_says_what_the_definition_says(data: bytes) -> None:
    assert crc32c(data) == bitwise_crc32c(data)


@given(
    st.floats(0, 1e10),
    st.integers(0, 2**62),
    st.text(min_size=1, max_size=300),
    st.floats(width=32, allow_nan=False),
)
def test_an_event_comes_back(wall_s: float, step: int, tag: str, value: float) -> None:
    tag = tag.encode("utf-8", "replace").decode()
    assert parsed(event(wall_s, step, tag=tag, value=value)) == Event(wall_s, step, "", tag, value)


def test_the_scalars_of_a_run(tmp_path: Path) -> None:
    events = EventFile(tmp_path, 1000.0)
    events.add(report(1, 2.0, 10, examples=640, loss=0.5, staleness=None), 1002.0)
    events.add(epoch(2.0, 1), 1002.0)
    events.add(evaluate(2.5, 10, accuracy=0.75, training_accuracy=0.875, loss=None), 1002.5)
    (path,) = tmp_path.glob("events.out.tfevents.*")
    found = read(path)  # while the file is open
    events.add(report(1, 4.0, 20, examples=640, loss=1e300), 1004.0)
    events.close()
    assert found[0] == Event(1000.0, 0, "brain.Event:2")
    assert found[1:] == [
        Event(1002.0, 10, "", "training/loss", 0.5),
        Event(1002.0, 10, "", "worker/1/examples_per_s", 320.0),
        Event(1002.0, 10, "", "worker/1/bytes_per_s", 500_000.0),
        Event(1002.5, 10, "", "held_out/accuracy", 0.75),
        Event(1002.5, 10, "", "training_examples/accuracy", 0.875),
    ]
    later = read(path)[len(found) :]
    assert [(each.tag, each.value) for each in later] == [
        ("training/loss", float("inf")),
        ("worker/1/examples_per_s", 320.0),
        ("worker/1/bytes_per_s", 500_000.0),
    ]
