"""Folders of images that Pillow wrote: decoded once, kept, and a sentence for each damage."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsgd_cli.agent import paths
from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.launcher.environment import launcher_cache
from dsgd_cli.learning.adapters import load_data
from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.learning.pixels import Pixels
from dsgd_cli.learning.readers import cache
from dsgd_cli.learning.readers import images as reader
from tests.learning.data_cache import digests_of_three, entries

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dsgd" / "data"


def photos(tmp_path: Path, each: int = 10, **more: Any) -> Path:
    """A class for each colour; an image is brighter the larger its number."""
    folder = tmp_path / "photos"
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            shade = tuple(part * (i + 1) // each for part in colour)
            Image.new("RGB", (12 + i, 9), shade).save(folder / name / f"image_{i:04}.png", **more)
    return folder


def read(path: Path, **options: Any) -> Dataset:
    return load_data("images", path=path, options={"size": [4, 6], **options})


# ---- what is read


def test_classes_are_numbered_by_name_and_values_are_from_0_to_1(tmp_path: Path) -> None:
    data = read(photos(tmp_path))
    assert (data.x.shape, data.x_test.shape) == ((24, 4, 6, 3), (6, 4, 6, 3))
    assert np.bincount(data.y).tolist() == [8, 8, 8]
    assert data.classes == ("blue", "green", "red")
    assert np.bincount(data.y_test).tolist() == [2, 2, 2]
    assert (data.x[:1].dtype, data.y.dtype) == (np.float32, np.int64)
    for x, y in ((data.x[:], data.y), (data.x_test[:], data.y_test)):
        mean = x.mean(axis=(1, 2))
        assert (mean.argmax(axis=1) == 2 - y).all() and mean.max() <= 1
    shades = sorted(round(float(x.max()), 1) for x in [*data.x[:], *data.x_test[:]])
    assert shades == sorted([i / 10 for i in range(1, 11)] * 3)


def test_the_split_is_always_the_same_and_shows_every_class(tmp_path: Path) -> None:
    folder = photos(tmp_path, each=3)
    for path in sorted((folder / "red").iterdir())[1:]:
        path.unlink()
    data = read(folder, test_fraction=0.9)
    assert np.bincount(data.y, minlength=3).tolist() == [1, 1, 1]
    assert np.bincount(data.y_test, minlength=3).tolist() == [2, 2, 0]
    moved = folder.rename(tmp_path / "moved")
    assert read(moved, test_fraction=0.9).digest() == data.digest()


def test_grey_images_of_many_kinds(tmp_path: Path) -> None:
    folder = photos(tmp_path, each=3)
    image = Image.new("RGB", (8, 8), (200, 200, 200))
    deep = folder / "red" / "deep"
    deep.mkdir()
    image.save(deep / "a.JPG", "JPEG")
    image.save(deep / "b.bmp")
    image.convert("CMYK").save(deep / "c.jpeg")
    image.convert("1").save(deep / "d.png")
    image.convert("P").save(deep / "e.gif")
    image.convert("P").save(deep / "f.png", transparency=b"\x00\x80")
    image.convert("LA").save(deep / "g.webp")
    (deep / "README.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    (folder / "notes.txt").write_text("no class")
    data = read(folder, grey=True)
    assert len(data.x) + len(data.x_test) == 16 and data.x.shape[1:] == (4, 6)


def test_large_photographs_keep_their_colours(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    wide = np.zeros((600, 900, 3), np.uint8)
    wide[:, :450, 0] = wide[300:, :, 2] = 200
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(wide).save(folder / name / f"{i}.jpg", quality=95)
    x = read(folder, test_fraction=0.4).x[0]  # (4, 6, 3)
    expected = wide[75::150, 75::150] / 255
    np.testing.assert_allclose(x, expected, atol=0.12)  # neighbours are mixed in at the edges


def test_the_default_size(tmp_path: Path) -> None:
    assert load_data("images", path=photos(tmp_path)).x.shape == (24, 64, 64, 3)


# ---- what is kept


def test_it_is_decoded_once_for_all_and_read_by_memory_map(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path)
    first = read(folder)
    monkeypatch.setattr(reader, "_decoded", lambda *_: pytest.fail("decoded again"))
    again = read(folder)
    np.testing.assert_array_equal(again.x[:], first.x[:])
    assert again.digest() == first.digest()
    assert isinstance(again.x, Pixels) and not again.x.raw.flags.writeable
    base: Any = again.x.raw
    while not isinstance(base, np.memmap):
        base = base.base
    (entry,) = entries(home)
    assert home.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in entry.iterdir()) == ["pixels.npy", "source"]


def test_what_changes_is_decoded_again(tmp_path: Path, home: Path) -> None:
    folder = photos(tmp_path)
    first = read(folder)
    file = folder / "red" / "image_0000.png"
    file.write_bytes((folder / "red" / "image_0009.png").read_bytes())
    other = read(folder)
    assert other.digest() != first.digest()
    assert len(entries(home)) == 2
    digests = {read(folder, **o).digest() for o in ({}, {"grey": True}, {"test_fraction": 0.5})}
    assert len(digests) == 3 and len(entries(home)) == 4
    os.utime(file, (1, 1))  # the same content: decoded again, and the same data set
    assert read(folder).digest() == other.digest()
    assert len(entries(home)) == 5


@pytest.mark.parametrize("damage", ["cut", "source", "empty", "shape"])
def test_a_damaged_entry_is_made_anew(tmp_path: Path, home: Path, damage: str) -> None:
    folder = photos(tmp_path)
    digest = read(folder).digest()
    (entry,) = entries(home)
    if damage == "cut":
        os.truncate(entry / "pixels.npy", 500)
    elif damage == "source":
        (entry / "source").unlink()
    elif damage == "empty":
        (entry / "pixels.npy").write_bytes(b"")
    else:
        np.save(entry / "pixels.npy", np.zeros((30, 4, 6), np.uint8))
    data = read(folder)
    assert data.digest() == digest and data.x.shape == (24, 4, 6, 3)
    assert entries(home) == [entry]


def test_what_nobody_uses_goes(tmp_path: Path, home: Path) -> None:
    folder = photos(tmp_path)
    read(folder)
    (entry,) = entries(home)
    part = home / ".killed.part"
    part.mkdir()
    os.utime(entry, (1, 1))
    read(folder)  # used again
    assert time.time() - entry.stat().st_mtime < 60
    read(folder, grey=True)
    assert len(entries(home)) == 2 and not part.exists()
    os.utime(entry, (1, 1))
    read(folder, size=[2, 2])
    assert len(entries(home)) == 2 and not entry.exists()


def _digest(folder: Path, answers: Any) -> None:
    answers.put(read(folder).digest())


def test_workers_that_start_together_decode_once(tmp_path: Path, home: Path) -> None:
    assert len(digests_of_three("spawn", _digest, photos(tmp_path))) == 1
    assert len(entries(home)) == 1


def test_the_cache_is_where_the_hosts_cache_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (os.environ["XDG_CACHE_HOME"], "relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.data_cache().parent == paths.cache() == launcher_cache()


# ---- what cannot be used


def emptied(folder: Path) -> None:
    for path in (folder / "red").iterdir():
        path.unlink()


def only(folder: Path) -> None:
    shutil.rmtree(folder / "red")
    shutil.rmtree(folder / "blue")


def cut(folder: Path) -> None:
    path = folder / "red" / "image_0003.png"
    path.write_bytes(path.read_bytes()[:-30])


def torn(folder: Path) -> None:
    Image.effect_noise((64, 64), 90).save(folder / "red" / "z.jpg")
    path = folder / "red" / "z.jpg"
    path.write_bytes(path.read_bytes()[:700])


def deep(folder: Path) -> None:
    Image.new("I;16", (4, 4)).save(folder / "red" / "z.png")


def gone(folder: Path) -> None:
    (folder / "red" / "z.png").symlink_to("nowhere")


def loop(folder: Path) -> None:
    (folder / "red" / "again").symlink_to("..")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "photos: cannot be read: No such file"),
        (only, "photos: only one class in it, green"),
        (emptied, r"photos/red: no images in this folder \(\.bmp, "),
        (cut, "photos/red/image_0003.png: not a readable image: "),
        (torn, "photos/red/z.jpg: not a readable image: image file is truncated"),
        (deep, "photos/red/z.png: not a readable image: it has more than 8 bits"),
        (gone, "photos/red/z.png: cannot be read: No such file"),
        (loop, "too deep .is there a link to a folder around it"),
        (
            lambda folder: (folder / "red" / "z.png").write_text("no image") and None,
            "photos/red/z.png: not a readable image: unknown format",
        ),
        (
            lambda folder: (folder / "red" / "z.png").write_bytes(b"") and None,
            "photos/red/z.png: not a readable image: unknown format",
        ),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, home: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = photos(tmp_path)
    spoil(folder)
    with pytest.raises(UserCodeError, match=message) as caught:
        read(folder)
    assert caught.value.exit_code == 6 and caught.value.remedy is not None
    assert not home.exists() or entries(home) == []


def test_empty_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserCodeError, match="empty: no class's folder in it"):
        read(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(UserCodeError, match="file: cannot be read: Not a directory"):
        read(tmp_path / "file")


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="the classes have too few images to hold out"):
        read(photos(tmp_path, each=2))


def test_a_folder_that_changes_meanwhile(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, decoded = photos(tmp_path), reader._decoded

    def slow(*arguments: Any) -> bytes:
        (folder / "red" / "image_0001.png").touch()
        return decoded(*arguments)

    monkeypatch.setattr(reader, "_decoded", slow)
    with pytest.raises(UserCodeError, match="photos: it changed while it was read"):
        read(folder)
    assert entries(home) == []


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserCodeError, match="this host's python needs Pillow") as caught:
        read(folder)
    assert caught.value.remedy == "pip install 'dsgd[images]'"


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = photos(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserCodeError, match=r"cannot keep decoded data in .*: Not a dir") as caught:
        read(folder)
    assert "XDG_CACHE_HOME" in caught.value.remedy
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(reader, "begin", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(UserCodeError, match=r"cannot keep decoded data in .*: No space left"):
        read(folder)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = photos(tmp_path, each=2)
    os.mkfifo(folder / "red" / "pipe.png")
    with pytest.raises(UserCodeError, match=r"red/pipe\.png: not a regular file"):
        read(folder)
