"""A file's arrays once per host: read once, mapped by all, made anew when anything is different."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import dump_svmlight_file

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning import sharing
from dsgd_cli.learning.adapters import forget, load_data
from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.learning.pixels import Pixels
from dsgd_cli.learning.sharing import shared_data
from tests.learning.data_cache import digests_of_three, entries

Array = np.ndarray[Any, Any]
N, WIDTH = 300, 40
SMALL = 10_000  # bytes, in these tests


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sharing, "SMALL_BYTES", SMALL)
    return tmp_path / "cache" / "dsgd" / "data"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows whenever a reader reads."""
    seen: list[str] = []

    def counted(kind: str, *arguments: Any) -> Dataset:
        seen.append(kind)
        return load_data(kind, *arguments)

    monkeypatch.setattr(sharing, "load_data", counted)
    return seen


def numbers() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, WIDTH)), rng.integers(0, 3, N)


def npz(tmp_path: Path) -> Path:
    x, y = numbers()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return tmp_path / "data.npz"


def npz_with_a_test_set(tmp_path: Path) -> Path:
    x = numbers()[0]
    x = np.asfortranarray(x.astype(">f8"))
    np.savez_compressed(tmp_path / "data.npz", x=x, y=x[:, 0], x_test=x[:9], y_test=x[:9, 0])
    return tmp_path / "data.npz"


def csv(tmp_path: Path) -> Path:
    x, y = numbers()
    np.savetxt(tmp_path / "data.csv", np.c_[x, y], delimiter=",")
    return tmp_path / "data.csv"


def csv_with_names(tmp_path: Path) -> Path:
    rows = [",".join([*map(str, row), ("cat", "ant")[i % 2]]) for i, row in enumerate(numbers()[0])]
    head = ",".join([*(f"x{i}" for i in range(rows[0].count(","))), "kind"])
    (tmp_path / "data.csv").write_text("\n".join([head, *rows]))
    return tmp_path / "data.csv"


def svmlight(tmp_path: Path) -> Path:
    dump_svmlight_file(*numbers(), str(tmp_path / "data.svm"))
    return tmp_path / "data.svm"


def idx(tmp_path: Path) -> Path:
    rng, folder = np.random.default_rng(0), tmp_path / "numbers"
    folder.mkdir()
    for what, shape in (("images-idx3", (N, 8, 8)), ("labels-idx1", (N,))):
        header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        body = rng.integers(0, 9, shape, np.uint8).tobytes()
        (folder / f"train-{what}-ubyte").write_bytes(header + body)
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "npz": npz,
    "csv": csv,
    "svmlight": svmlight,
    "idx": idx,
}
EACH = pytest.mark.parametrize("kind", WRITERS)


def shared(kind: str, path: Path, dtype: str = "float32", **options: Any) -> Dataset:
    return shared_data(kind, "", options, path, dtype)


def arrays(data: Dataset) -> list[Array]:
    parts = (data.x, data.y, data.x_test, data.y_test)
    return [part.raw if isinstance(part, Pixels) else part for part in parts]


def is_mapped(array: Array) -> bool:
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


# ---- what is read


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("kind", "write"),
    [*WRITERS.items(), ("npz", npz_with_a_test_set), ("csv", csv_with_names)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_is_shared_is_what_is_read(
    tmp_path: Path, kind: str, write: Callable[[Path], Path], dtype: str
) -> None:
    path = write(tmp_path)
    plain, data = load_data(kind, path=path).as_dtype(dtype), shared(kind, path, dtype)
    for one, other in zip(arrays(plain), arrays(data), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype and is_mapped(other) and not other.flags.writeable
    assert (data.name, data.digest()) == (plain.name, plain.digest())
    assert (data.classes, data.columns) == (plain.classes, plain.columns)
    assert type(data.x) is type(plain.x) and data.x[:2].dtype == dtype
    np.testing.assert_array_equal(data.example(4)[0], plain.example(4)[0])


@EACH
def test_the_second_one_reads_nothing(
    tmp_path: Path, home: Path, reads: list[str], kind: str
) -> None:
    path = WRITERS[kind](tmp_path)
    digests = {shared(kind, path).digest() for _ in range(3)}
    assert (reads, len(digests), len(entries(home))) == ([kind], 1, 1)


@EACH
def test_whatever_is_different_is_read(tmp_path: Path, reads: list[str], kind: str) -> None:
    path = WRITERS[kind](tmp_path)
    digest = shared(kind, path).digest()
    assert shared(kind, path, test_fraction=0.5).digest() != digest
    assert shared(kind, path, "float64").digest() != digest
    file = next(path.iterdir()) if path.is_dir() else path
    os.utime(file, ns=(0, 1))
    assert shared(kind, path).digest() == digest
    assert len(reads) == 4


def test_a_changed_file_is_another(tmp_path: Path, reads: list[str]) -> None:
    path = csv(tmp_path)
    before = shared("csv", path)
    path.write_text(path.read_text().replace("0", "1", 1))
    after = shared("csv", path)
    assert after.digest() != before.digest() and len(reads) == 2
    np.testing.assert_array_equal(after.x, load_data("csv", path=path).x)


def test_a_file_of_the_same_size_and_mtime_is_another(tmp_path: Path, reads: list[str]) -> None:
    """As `cp -p` and `rsync -t` leave it, and as two hosts have it that share a home."""
    path = csv(tmp_path)
    before, state = shared("csv", path), path.stat()
    path.write_text(path.read_text().replace("0", "1", 1))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert path.stat().st_size == state.st_size
    assert shared("csv", path).digest() != before.digest() and len(reads) == 2


def test_workers_of_a_host_read_once(tmp_path: Path, home: Path) -> None:
    assert len(digests_of_three("fork", _digest, csv(tmp_path))) == 1
    assert len(entries(home)) == 1


def _digest(path: Path, answers: Any) -> None:
    answers.put(shared("csv", path).digest())


# ---- small files


@EACH
def test_small_files_leave_nothing(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = WRITERS[kind](tmp_path)
    large = shared(kind, path)
    monkeypatch.setattr(sharing, "SMALL_BYTES", 1 << 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    small = shared(kind, path)
    assert not any(map(is_mapped, arrays(small))) and not (tmp_path / "other").exists()
    assert small.digest() == large.digest()  # hosts may differ in how they have it


def test_a_small_file_of_large_arrays_is_shared(
    tmp_path: Path, home: Path, reads: list[str]
) -> None:
    packed, sparse = tmp_path / "zeros.npz", tmp_path / "sparse.svm"
    np.savez_compressed(packed, x=np.zeros((500, 50)), y=np.arange(500))
    sparse.write_text("1 1:1 900:1\n" * 20)
    for kind, path in (("npz", packed), ("svmlight", sparse)):
        assert path.stat().st_size < SMALL
        assert all(is_mapped(shared(kind, path).x) for _ in range(3))
    assert (reads, len(entries(home))) == (["npz", "svmlight"], 2)


def test_what_is_no_file_is_loaded_as_ever() -> None:
    digits = shared_data("builtin", "digits", {}, None, "float32")
    assert digits.digest() == load_data("builtin", "digits").digest()


def test_what_a_module_maps_stays_mapped(tmp_path: Path) -> None:
    x = numbers()[0]
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "data.py").write_text(
        "import numpy as np\n"
        f"x = np.load({str(tmp_path / 'x.npy')!r}, mmap_mode='r')\n"
        f"def load(): return x, np.arange({N}), x[:9], np.arange(9)\n"
    )
    data = shared_data("file", "", {}, tmp_path / "data.py", "float64")
    assert is_mapped(data.x) and is_mapped(data.x_test)
    assert not is_mapped(data.as_dtype("float32").x)
    forget()


# ---- damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE: list[Callable[[Path], object]] = [
    cut,
    Path.unlink,
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(bytes(file.stat().st_size)),
    lambda file: file.write_text('{"pixels": 1}'),
    lambda file: file.write_bytes(b"\x93NUMPY\x01\x00\x10\x00" + b"{" * 16),
]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["x.npy", "y_test.npy", "facts.json"])
def test_a_damaged_entry_is_made_anew(
    tmp_path: Path, home: Path, reads: list[str], name: str, damage: Callable[[Path], object]
) -> None:
    path = npz(tmp_path)
    before = shared("npz", path)
    (entry,) = entries(home)
    whole = before.x.copy() if isinstance(before.x, np.ndarray) else None
    del before  # its pages would be cut off with the file
    damage(entry / name)
    np.testing.assert_array_equal(shared("npz", path).x, whole)
    assert (len(reads), entries(home)) == (2, [entry])


BAD: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "cut": ("npz", npz, r"data\.npz: not a readable \.npz file"),
    "text": ("csv", csv, r"data\.csv:301: the row has 1 cells"),
    "word": ("svmlight", svmlight, r"data\.svm:301: label: 'damaged' is not a number"),
    "short": ("idx", idx, r"it has more than the"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_said_each_time_and_leaves_no_entry(
    tmp_path: Path, home: Path, case: str
) -> None:
    kind, write, message = BAD[case]
    path = write(tmp_path)
    if kind == "npz":
        cut(path)
    else:
        file = path / "train-images-idx3-ubyte" if path.is_dir() else path
        with file.open("a") as opened:
            opened.write("damaged")
    said = []
    for load in (load_data, shared_data, shared_data):
        arguments = (kind, "", {}, path) + (() if load is load_data else ("float32",))
        with pytest.raises(UserCodeError, match=message) as caught:
            load(*arguments)  # type: ignore[operator]
        said.append((caught.value.message, caught.value.remedy, caught.value.exit_code))
    assert len(set(said)) == 1 and entries(home) == []


@pytest.mark.parametrize("kind", ["npz", "csv", "svmlight", "idx"])
def test_a_file_that_is_not_there_is_the_readers_to_explain(tmp_path: Path, kind: str) -> None:
    missing, loop = tmp_path / "missing", tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (missing, loop):
        with pytest.raises(UserCodeError, match=f"{path.name}: (not a readable|there is no such)"):
            shared(kind, path)


def test_numbers_that_nothing_can_be_done_with_leave_no_entry(tmp_path: Path, home: Path) -> None:
    x, y = numbers()
    for value, message in ((np.nan, r"x\[7, 0\] is nan"), (1e99, "is too large for float32")):
        x[7, 0] = value
        np.savez(tmp_path / "data.npz", x=x, y=y, x_test=x[:3], y_test=y[:3])
        with pytest.raises(UserCodeError, match=message):
            shared("npz", tmp_path / "data.npz")
    assert entries(home) == []
    assert shared("npz", tmp_path / "data.npz", "float64").x[7, 0] == 1e99


def test_a_file_that_changes_meanwhile(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = csv(tmp_path)

    def slow(*arguments: Any) -> Dataset:
        data = load_data(*arguments)
        path.touch()
        return data

    monkeypatch.setattr(sharing, "load_data", slow)
    with pytest.raises(UserCodeError, match=r"data\.csv: it changed while it was read"):
        shared("csv", path)
    assert entries(home) == []


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process may become larger than some kilobytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk(tmp_path: Path, home: Path, request: pytest.FixtureRequest) -> None:
    path = npz(tmp_path)
    request.getfixturevalue("full_disk")
    with pytest.raises(UserCodeError, match=r"cannot keep decoded data in .*: File too large") as e:
        shared("npz", path)
    assert "XDG_CACHE_HOME" in e.value.remedy
    assert entries(home) == []


# ---- memory

LARGE = 200_000_000  # bytes

TAKE_ALL = """
import re, sys
from pathlib import Path
from dsgd_cli.daemons import material
from dsgd_cli.daemons.computing import batches
from dsgd_cli.engine.tasks import order
from dsgd_cli.learning.adapters import load_data
from dsgd_cli.learning.evaluate import evaluate

if sys.argv[2] == "held":
    material.shared_data = lambda *given: load_data(*given[:-1]).as_dtype(given[-1])

def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\\s*(\\d+) kB", status)[1])

ref = {"name": "", "path": sys.argv[1], "on_host": True, "options": {}}
train = {
    "model": {**ref, "kind": "builtin", "name": "softmax", "path": "", "on_host": False},
    "data": {**ref, "kind": "npz"},
    "dtype": "float32",
    "batch_size": 64,
    "algorithm": {"name": "downpour"},
}
before = anonymous()
found = material.load(train, 0, {})
params, most = found.initial(), anonymous()
for x, y in batches(found.data, order(0, 1, found.data.examples), found.batch_size):
    x.sum()
    most = max(most, anonymous())
evaluate(found.model, params, found.data.x_test, found.data.y_test)
print(max(most, anonymous()) - before)
"""


@pytest.fixture
def large(tmp_path: Path, home: Path) -> Iterator[Path]:
    """Neither it nor its entry is kept until pytest tidies up, days later."""
    path = tmp_path / "large.npz"
    x = np.random.default_rng(0).random((LARGE // 4096, 1024), np.float32)
    np.savez(path, x=x, y=np.arange(len(x)) % 10)
    yield path
    path.unlink()
    shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
def test_a_worker_that_takes_every_batch_holds_no_data(large: Path) -> None:
    """Neither the one that makes the entry, once it is made, nor the others."""

    def added(how: str) -> int:
        command = [sys.executable, "-c", TAKE_ALL, str(large), how]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100)
        return int(re.fullmatch(r"(-?\d+)\n", done.stdout)[1])  # type: ignore[index]

    assert large.stat().st_size >= LARGE * 0.99
    held, maker, other = added("held"), added("shared"), added("shared")
    print(held, maker, other)
    assert held > LARGE * 0.99
    assert maker < 40_000_000 and other < 40_000_000
