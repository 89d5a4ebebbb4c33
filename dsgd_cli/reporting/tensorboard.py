"""Scalars of a run as a TensorBoard event file, written while the run goes on.

The format is small enough to be written here: TFRecord framing (length, its checksum, data, their
checksum; masked CRC-32C) around `Event` messages of tensorflow/core/util/event.proto, of which four
fields are used. The packages that write it need numpy and protobuf, which this half does without.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from dsgd_cli.contract.names import TRAINING_METRIC
from dsgd_cli.reporting.runs import Record
from dsgd_cli.reporting.series import NOT_METRICS, number

VERSION = "brain.Event:2"
NAME = "events.out.tfevents.{second}.dsgd"
POLYNOMIAL = 0x82F63B78  # Castagnoli's, reversed
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # how protobuf writes a field


class EventFile:
    """One file of scalars. Each record is on disk when `add` returns: somebody may be watching."""

    def __init__(self, folder: Path, now_s: float) -> None:
        self._file: BinaryIO = (folder / NAME.format(second=int(now_s))).open("wb")
        self._reported: dict[object, float] = {}
        self._append(event(now_s, 0, version=VERSION))

    def add(self, record: Record, now_s: float) -> None:
        """The scalars of a record of metrics.jsonl."""
        step = int(number(record.get("step")) or 0)
        for tag, value in self._scalars(record):
            self._append(event(now_s, step, tag=tag, value=value))

    def close(self) -> None:
        self._file.close()

    def _append(self, data: bytes) -> None:
        self._file.write(framed(data))
        self._file.flush()

    def _scalars(self, record: Record) -> Iterator[tuple[str, float]]:
        """(tag, value): `held_out/accuracy`, `training_examples/accuracy`, `training/loss`,
        `worker/0/examples_per_s`, …"""
        found: Iterable[tuple[str, object]]
        if record.get("kind") == "evaluate":
            found = ((_tag(name), record[name]) for name in record if name not in NOT_METRICS)
        elif record.get("kind") == "report":
            found = self._of_report(record)
        else:
            return
        for tag, value in found:
            if (known := number(value)) is not None:
                yield tag, known

    def _of_report(self, record: Record) -> Iterator[tuple[str, object]]:
        yield "training/loss", record.get("loss")
        yield "training/staleness", record.get("staleness")
        worker, seconds = record.get("worker"), number(record.get("time")) or 0.0
        took_s = seconds - self._reported.get(worker, 0.0)
        self._reported[worker] = seconds
        if took_s > 0:
            for name in ("examples", "bytes"):
                amount = number(record.get(name))
                yield f"worker/{worker}/{name}_per_s", amount and amount / took_s


def _tag(name: str) -> str:
    """`training/loss` is that of the batches."""
    if name.startswith(TRAINING_METRIC):
        return f"training_examples/{name.removeprefix(TRAINING_METRIC)}"
    return f"held_out/{name}"


# ── Event ──────────────────────────────────────────────────────────────────────────────────────


def event(
    wall_s: float, step: int, *, version: str = "", tag: str = "", value: float = 0.0
) -> bytes:
    """An `Event`: the version of the file, or one scalar."""
    head = _key(1, _FIXED64) + struct.pack("<d", wall_s) + _key(2, _VARINT) + _varint(step)
    if version:
        return head + _bytes(3, version.encode())
    scalar = _bytes(1, tag.encode()) + _key(2, _FIXED32) + _float32(value)
    return head + _bytes(5, _bytes(1, scalar))  # summary { value { tag, simple_value } }


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _bytes(field: int, data: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(data)) + data


def _float32(value: float) -> bytes:
    try:
        return struct.pack("<f", value)
    except OverflowError:
        return struct.pack("<f", float("inf") if value > 0 else float("-inf"))


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


# ── TFRecord ───────────────────────────────────────────────────────────────────────────────────


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked_crc(length) + data + masked_crc(data)


def masked_crc(data: bytes) -> bytes:
    """CRC-32C, turned and shifted: a checksum of data that have checksums in them is a poor one."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _entry(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE = tuple(map(_entry, range(256)))
