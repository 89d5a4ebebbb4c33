"""Photographs: a folder with a folder for each class, as Caltech-101 has it.

Each file is decoded and stretched to one size once, into the host's cache; workers read that by
memory map. What identifies the data set is the content of the files, not the pixels: their last
bits may depend on the version of the decoder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.datasets import SPLIT_SEED, Dataset
from dsgd_cli.learning.pixels import Array, Pixels
from dsgd_cli.learning.readers.cache import begin, kept, mapped

# what Pillow reads everywhere; other files (README, Thumbs.db) are no examples
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
IGNORED = ("__pycache__",)
MAX_DEPTH = 50  # of folders: a link may lead to a folder around it
LAYOUT = "give a folder that has a folder of images for each class"
AT_A_TIME = 256  # images whose pixels are held until they are written
PIXELS, SOURCE = "pixels.npy", "source"
VERSION = 1  # of what is in the cache


def images(
    path: Path,
    size: Sequence[int] = (64, 64),
    grey: bool = False,
    test_fraction: float = 0.2,
) -> Dataset:
    """Values from 0 to 1, (examples, height, width, 3), or (examples, height, width) if `grey`.

    Classes are numbered in alphabetical order. `test_fraction` of each class is held out, always
    the same.
    """
    classes, files = _listed(path)
    y = np.array([file.label for file in files])
    if test_fraction == 0:  # as `hold_out` has it
        raw, _ = _kept(path, files, lambda: _listed(path) == (classes, files), size, grey, [0])
        return Dataset(path.name, Pixels(raw), y, Pixels(raw[:1]), y[:1], classes)
    train, test = split(y, test_fraction)
    if not len(test):
        raise UserCodeError(
            f"{path.name}: the classes have too few images to hold out {test_fraction:g} of each",
            remedy="add images, or give another test_fraction",
        )
    order = np.concatenate([train, test])
    chosen, again = [files[i] for i in order], lambda: _listed(path) == (classes, files)
    raw, source = _kept(path, chosen, again, size, grey, [test_fraction])
    n = len(train)
    x, x_test = Pixels(raw[:n], source=source), Pixels(raw[n:], source=source)
    return Dataset(path.name, x, y[train], x_test, y[test], classes)


def images_without_labels(
    path: Path, size: Sequence[int] = (64, 64), grey: bool = False
) -> tuple[Pixels, list[str]]:
    """All images in the folder and below it, as `images` has them, and their names there."""
    files = _unlabelled(path)
    raw, _ = _kept(path, files, lambda: _unlabelled(path) == files, size, grey, [])
    return Pixels(raw), [file.name for file in files]


def image_names(path: Path, test_fraction: float) -> list[str]:
    """The files of what `images` gives, below the folder: of the training set, then held out."""
    _, files = _listed(path)
    if test_fraction == 0:
        return [file.name for file in files]
    parts = split(np.array([file.label for file in files]), test_fraction)
    return [files[i].name for part in parts for i in part]


def has_folders(path: Path) -> bool:
    """Whether there can be classes."""
    try:
        return any(entry.is_dir() for entry in _visible(path))
    except OSError:
        return True  # which `images` will explain


# ── files ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _File:
    """An image, and what changes when it changes."""

    name: str  # below the folder
    label: int
    bytes: int
    mtime_ns: int
    ctime_ns: int  # which a copy does not keep, and which differs between hosts that share a home


def _listed(folder: Path) -> tuple[tuple[str, ...], list[_File]]:
    """The classes, and all images, class by class in the order of their names."""
    try:
        classes = tuple(entry.name for entry in _visible(folder) if entry.is_dir())
        if len(classes) < 2:
            found = f"only one class in it, {classes[0]}" if classes else "no class's folder in it"
            raise UserCodeError(f"{folder.name}: {found}", remedy=LAYOUT)
        files: list[_File] = []
        for label, name in enumerate(classes):
            before = len(files)
            files += list(_below(folder / name, name, label))
            if len(files) == before:
                raise UserCodeError(
                    f"{folder.name}/{name}: no images in this folder ({', '.join(SUFFIXES)})",
                    remedy="put images there, or remove the folder",
                )
        return classes, files
    except OSError as error:
        raise UserCodeError(
            f"{error.filename or folder.name}: cannot be read: {error.strerror}", remedy=LAYOUT
        ) from error


def _unlabelled(folder: Path) -> list[_File]:
    try:
        if files := list(_below(folder, "", 0)):
            return files
    except OSError as error:
        raise UserCodeError(
            f"{error.filename or folder.name}: cannot be read: {error.strerror}"
        ) from error
    raise UserCodeError(f"{folder.name}: no images in this folder ({', '.join(SUFFIXES)})")


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        seen = [e for e in entries if not e.name.startswith(".") and e.name not in IGNORED]
    return sorted(seen, key=lambda entry: entry.name)


def _below(folder: Path, name: str, label: int) -> Iterator[_File]:
    if name.count("/") > MAX_DEPTH:
        raise UserCodeError(f"{name}: too deep (is there a link to a folder around it?)")
    for entry in _visible(folder):
        inner = f"{name}/{entry.name}" if name else entry.name
        if entry.is_dir():
            yield from _below(folder / entry.name, inner, label)
        elif Path(entry.name).suffix.lower() in SUFFIXES:
            found = entry.stat()
            if not stat.S_ISREG(found.st_mode):
                raise UserCodeError(f"{inner}: not a regular file", remedy="remove it")
            times = (found.st_mtime_ns, found.st_ctime_ns)
            yield _File(inner, label, found.st_size, *times)


def split(y: Array, fraction: float) -> tuple[Array, Array]:
    """(train, test): positions in random order, which is always the same; each class in both."""
    order = np.random.RandomState(SPLIT_SEED).permutation(len(y))
    held_out = np.zeros(len(y), bool)
    for label in range(y[-1] + 1):
        of_class = order[y[order] == label]
        held_out[of_class[: min(round(len(of_class) * fraction), len(of_class) - 1)]] = True
    return order[~held_out[order]], order[held_out[order]]


# ── pixels ─────────────────────────────────────────────────────────────────────────────────────


def _kept(
    path: Path,
    files: Sequence[_File],
    unchanged: Callable[[], bool],
    size: Sequence[int],
    grey: bool,
    more: Sequence[Any],
) -> tuple[Array, str]:
    """The files' pixels in that order, and their source; `more`: what else the order follows."""
    shape = (len(files), *size) if grey else (len(files), *size, 3)
    options = [VERSION, list(size), grey, *more]
    state = sorted([file.name, file.bytes, file.mtime_ns, file.ctime_ns] for file in files)
    key = hashlib.sha256(json.dumps([str(path.resolve()), *options, state]).encode()).hexdigest()

    def make(folder: Path) -> None:
        _decode_all(path, files, shape, json.dumps(options), folder)
        if not unchanged():
            raise UserCodeError(f"{path.name}: it changed while it was read", remedy="run again")

    return kept(key[:32], partial(_read, shape=shape), make)


def _read(folder: Path, shape: tuple[int, ...]) -> tuple[Array, str] | None:
    """The pixels by memory map and their source; None where they are not, or damaged."""
    try:
        raw, source = mapped(folder / PIXELS), (folder / SOURCE).read_text()
    except (OSError, ValueError):
        return None
    return (raw, source) if raw.shape == shape and raw.dtype == np.uint8 else None


def _decode_all(
    folder: Path, files: Sequence[_File], shape: tuple[int, ...], options: str, into: Path
) -> None:
    pillow = _pillow()
    source = hashlib.sha256(options.encode())

    def decoded(file: _File) -> tuple[bytes, bytes]:
        content = _content(folder / file.name)
        made = _decoded(pillow, content, shape[1:], f"{folder.name}/{file.name}")
        return hashlib.sha256(content).digest(), made

    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))  # Pillow lets go of the GIL
    with threads, (into / PIXELS).open("wb") as pixels:
        begin(pixels, np.dtype(np.uint8), shape)
        for start in range(0, len(files), AT_A_TIME):
            some = files[start : start + AT_A_TIME]
            for file, (digest, made) in zip(some, threads.map(decoded, some), strict=True):
                source.update(f"{file.label} ".encode() + digest)
                pixels.write(made)
    (into / SOURCE).write_text(source.hexdigest())


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserCodeError(f"{file}: cannot be read: {error.strerror}") from error


def _decoded(pillow: Any, content: bytes, shape: tuple[int, ...], name: str) -> bytes:
    """An image's bytes, stretched to `shape`."""
    width, height = shape[1], shape[0]
    try:
        with pillow.open(io.BytesIO(content)) as image:
            image.draft(None, (2 * width, 2 * height))  # a large JPEG is decoded smaller: quicker
            if image.mode[0] in "IF":
                raise ValueError("it has more than 8 bits a channel: convert it first")
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # Pillow warns otherwise
            image = image.convert("RGB" if len(shape) == 3 else "L")
            made: bytes = image.resize((width, height), pillow.Resampling.BILINEAR).tobytes()
            return made
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        what = type(error).__name__ == "UnidentifiedImageError"
        raise UserCodeError(
            f"{name}: not a readable image: {'unknown format' if what else error}",
            remedy="replace the file, or remove it",
        ) from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UserCodeError(
            "to read images, this host's python needs Pillow",
            remedy="pip install 'dsgd[images]'",
        ) from error
    return Image
