"""Bring the result home: slices of the parameters become one `model.safetensors`, logs follow.

The safetensors format is a length, a JSON header and the raw bytes in order; the shards are
contiguous slices of exactly these bytes, so they are streamed into place without numpy.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from dsgd_cli.contract.errors import DsgdError
from dsgd_cli.launcher.cluster import Cluster
from dsgd_cli.launcher.parallel import attempt
from dsgd_cli.launcher.remote import Message, Missing, Remote

DTYPES = {"float32": ("F32", 4), "float64": ("F64", 8)}


def make_run_dir(name: str, root: Path, label: str | None = None) -> Path:
    """A new folder `<root>/<name>-<time>`, or `<root>/<label>`."""
    label = label or f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _new_folder(root, label)
    except OSError as error:
        raise DsgdError(
            f"{root}: cannot make a folder for the run: {error.strerror}",
            remedy="give another place: --runs DIR",
        ) from None


def _new_folder(root: Path, name: str) -> Path:
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        folder = root / f"{name}{suffix}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise DsgdError(f"no free name for a run folder in {root}")


def header(layout: Message, metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file for these tensors, in their order."""
    code, item_bytes = DTYPES[layout["dtype"]]
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in layout["tensors"]:
        size = math.prod(shape) * item_bytes
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def slices(finished: Message) -> list[Message]:
    """The pieces of the final parameters, in their order: {process, host_path, sha256}."""
    found = sorted(finished["slices"], key=lambda piece: int(piece["server"]))
    return [{**piece, "process": f"server/{piece['server']}"} for piece in found]


def fetch_model(
    remotes: Mapping[str, Remote],
    host_of: Mapping[str, str],
    layout: Message,
    pieces: Sequence[Message],
    target: Path,
    metadata: Mapping[str, str],
) -> None:
    """Stream pieces of the parameters into one file. Raises DsgdError on a damaged one."""
    part = target.with_suffix(".part")
    try:
        with part.open("wb") as file:
            file.write(header(layout, metadata))
            for piece in pieces:
                _append(file, piece, remotes[host_of[piece["process"]]], host_of)
        part.rename(target)
    finally:
        part.unlink(missing_ok=True)
    for piece in pieces:
        remotes[host_of[piece["process"]]].call("remove", path=piece["host_path"])


def _append(file: IO[bytes], piece: Message, remote: Remote, host_of: Mapping[str, str]) -> None:
    digest = hashlib.sha256()
    size = int(remote.call("send", path=piece["host_path"])["size"])
    for chunk in remote.raw(size):
        digest.update(chunk)
        file.write(chunk)
    if digest.hexdigest() != piece["sha256"]:
        process = piece["process"]
        raise DsgdError(f"{process}@{host_of[process]}: its parameters came home damaged")


def fetch_logs(cluster: Cluster, run_dirs: Mapping[str, str], folder: Path) -> dict[str, DsgdError]:
    """Copy the log files of all processes; the errors of hosts that did not answer."""
    folder.mkdir(exist_ok=True)
    by_host: dict[str, list[str]] = {}
    for item in cluster.placed:
        by_host.setdefault(item.host, []).append(item.process)

    def one(host: str) -> None:
        remote = cluster.open(host)
        try:
            for process in by_host[host]:
                _fetch_log(remote, run_dirs[host], process, folder)
        finally:
            remote.close()

    hosts = [host for host in by_host if host in run_dirs]
    return attempt(hosts, one, phase="collect logs", deadline_s=30.0)[1]


def _fetch_log(remote: Remote, run_dir: str, process: str, folder: Path) -> None:
    """One log, with what was rotated away, oldest first."""
    name = process.replace("/", "-") + ".log"
    for suffix in (".3", ".2", ".1", ""):
        try:
            size = int(remote.call("send", path=f"{run_dir}/logs/{name}{suffix}")["size"])
        except Missing:
            continue
        with (folder / name).open("ab") as file:
            for chunk in remote.raw(size):
                file.write(chunk)
