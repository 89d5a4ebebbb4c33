"""From a reference in the YAML to a `Model` or a `Dataset`, and the boundary to user code.

A reference is `builtin` (name and options), `file` (a .py file), `module` (importable), for models
`torch` (a .py file and a name in it) or, for data, one of `readers.table` (a path and options).
Whatever user code raises, on import or when called, comes out of here as a UserCodeError with their
part of the traceback. User code is imported once per process, with its own folder on sys.path, and
nothing is written next to it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.contract.errors import DsgdError, SpecError, UserCodeError
from dsgd_cli.learning.checks import (
    as_floats,
    check_dataset,
    check_initial,
    check_loss,
    check_names,
    check_shape,
)
from dsgd_cli.learning.datasets import DATASETS, Dataset
from dsgd_cli.learning.models import MODELS, Functions
from dsgd_cli.learning.pixels import Pixels
from dsgd_cli.learning.readers.table import READERS

Array: TypeAlias = NDArray[Any]
Params: TypeAlias = Mapping[str, Array]

ARRAYS = ("x", "y", "x_test", "y_test")
# function -> the arguments that it is called with
CONTRACT = {
    "init": ("rng", "example"),
    "predict": ("params", "x"),
    "gradients": ("params", "x", "y"),
    "metrics": ("params", "x", "y"),
    "load": (),
}
TORCH_CONTRACT = {  # all of them optional
    "loss": ("outputs", "y"),
    "transform": ("x", "train"),
    "metrics": ("outputs", "y"),
}
MOST_NAME = 100  # characters of a metric's
MOST_CHARS, MOST_LINES = 2000, 400  # of a traceback: it has to fit into a message
OWN_FILES = (__file__, str(Path(__file__).with_name("torch_adapter.py")))  # not in tracebacks


@dataclass(frozen=True, slots=True)
class Model:
    """The user's functions, guarded: their mistakes become UserCodeErrors."""

    name: str
    functions: Functions
    takes_out: bool

    @property
    def has_metrics(self) -> bool:
        return self.functions.metrics is not None

    def init(self, rng: np.random.Generator, example: tuple[Array, Array]) -> dict[str, Array]:
        """Named float arrays; their order is the order of the parameter vector."""
        made = self._call("init", self.functions.init, rng, example)
        try:
            return check_initial(made)
        except UserCodeError as error:
            raise UserCodeError(f"{self.name}: {error.message}") from error

    def predict(self, params: Params, x: Array) -> Array:
        return np.asarray(self._call("predict", self.functions.predict, params, x))

    def gradients(self, params: Params, x: Array, y: Array, out: dict[str, Array]) -> float:
        """The loss; the gradients go to `out`: views of the push buffer, all overwritten.

        A function that takes `out=` writes there itself and nothing is copied. Neither loss nor
        gradients are checked for finiteness here.
        """
        function = self.functions.gradients
        try:
            result = function(params, x, y, out=out) if self.takes_out else function(params, x, y)
        except BaseException as error:
            raise _raised(f"{self.name}: gradients", error) from error
        if not isinstance(result, tuple) or len(result) != 2:
            raise UserCodeError(f"{self.name}: gradients must return (loss, dict of arrays)")
        loss, grads = result
        if grads is not out:
            try:
                _collect(out, grads)
            except UserCodeError as error:
                raise UserCodeError(f"{self.name}: {error.message}") from error
        return loss if type(loss) is float else check_loss(loss)

    def metrics(self, params: Params, x: Array | Pixels, y: Array) -> dict[str, float]:
        """What the user's `metrics` says, as floats."""
        assert self.functions.metrics is not None
        found = self._call("metrics", self.functions.metrics, params, x, y)
        if not isinstance(found, Mapping):
            raise UserCodeError(f"{self.name}: metrics must return a dict of numbers")
        values = {}
        for name, value in found.items():
            if not isinstance(name, str) or not (name.isprintable() and 0 < len(name) <= MOST_NAME):
                raise UserCodeError(
                    f"{self.name}: metrics: {_shown(name)} cannot be the name of a metric",
                    remedy=f"a name has 1 to {MOST_NAME} printable characters",
                )
            array = np.asarray(value)
            if array.size != 1 or array.dtype.kind not in "fiub":
                raise UserCodeError(
                    f"{self.name}: metrics: {name!r} is {_shown(value)}, not a number"
                )
            values[name] = float(array.reshape(-1)[0])
        return values

    def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except BaseException as error:
            raise _raised(f"{self.name}: {what}", error) from error


def reference(ref: Mapping[str, Any]) -> tuple[str, str, Mapping[str, Any]]:
    """(kind, name, options) of a reference in a run's `train` section."""
    return ref["kind"], ref["name"], ref["options"]


def batch_size_of(train: Mapping[str, Any]) -> int:
    """The examples that are computed at a time: a batch, or with `sandblaster` a piece of all."""
    return int(train["batch_size"] or train["algorithm"]["rows"])


def load_model(
    kind: str, name: str = "", options: Mapping[str, Any] | None = None, path: Path | None = None
) -> Model:
    """The model of a reference; `path` is where the file is on this host."""
    if kind == "torch":
        name, functions = _torch_model(name, path)
    elif kind == "builtin":
        functions = _made(MODELS, "model", name, options or {})
    else:
        module, name = _import(kind, name, path)
        functions = Functions(
            init=_function(module, name, "init"),
            predict=_function(module, name, "predict"),
            gradients=_function(module, name, "gradients"),
            metrics=_whole(_function(module, name, "metrics"))
            if hasattr(module, "metrics")
            else None,
        )
    return Model(name, functions, "out" in _parameters(functions.gradients))


def _whole(metrics: Callable[..., Any]) -> Callable[..., Any]:
    """The user's function gets an array; only the built-in ones take pixels piece by piece."""
    return lambda params, x, y: metrics(params, np.asarray(x), y)


def _torch_model(attribute: str, path: Path | None) -> tuple[str, Functions]:
    """`path:attribute`, a class of torch's or a function that makes a module, as functions."""
    try:
        from dsgd_cli.learning import torch_adapter  # seconds, and not a package of dsgd's
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torch":
            raise
        raise UserCodeError(
            f"torch is not installed for the python of this host ({sys.executable})",
            remedy="`pip install torch` there and set `env: existing`, or send it to the hosts with"
            " `env: {requirements: requirements.txt}`",
        ) from error
    module, file = _import("file", "", path)
    name = f"{file}:{attribute}"
    make = _found(module, attribute, f"{file}: there is no {attribute}", f"a class {attribute}")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UserCodeError(
            f"{name} is called without arguments: {error}",
            remedy="give its arguments defaults, or name a function that makes the module",
        ) from None
    except ValueError:  # something of C without a signature
        pass
    optional = {
        each: _function(module, file, each, TORCH_CONTRACT)
        for each in TORCH_CONTRACT
        if hasattr(module, each)
    }
    return name, torch_adapter.functions(name, make, **optional)


def load_data(
    kind: str, name: str = "", options: Mapping[str, Any] | None = None, path: Path | None = None
) -> Dataset:
    """The data set of a reference, checked."""
    if kind == "builtin":
        data: Dataset = _made(DATASETS, "data", name, options or {})
    elif kind in READERS:
        assert path is not None
        try:
            data = _made(READERS, "data", kind, {"path": path, **(options or {})})
        except MemoryError as error:
            raise UserCodeError(f"{path.name}: this host has too little memory for it") from error
    else:
        module, name = _import(kind, name, path)
        data = _loaded(name, _function(module, name, "load"))
    return check_dataset(data)


def _loaded(name: str, load: Callable[[], Any]) -> Dataset:
    try:
        loaded = load()
    except BaseException as error:
        raise _raised(f"{name}: load", error) from error
    if not isinstance(loaded, tuple | list) or len(loaded) != len(ARRAYS):
        many = len(loaded) if isinstance(loaded, tuple | list) else type(loaded).__name__
        raise UserCodeError(
            f"{name}: load must return {', '.join(ARRAYS)}; it returned {many}"
            + (" values" if isinstance(many, int) else "")
        )
    arrays = []
    for each, value in zip(ARRAYS, loaded, strict=True):
        try:
            arrays.append(np.asarray(value))
        except (ValueError, TypeError, RuntimeError) as error:
            raise UserCodeError(f"{name}: {each} is not an array: {error}") from error
    x, y, x_test, y_test = arrays
    return Dataset(name, x, y, x_test, y_test)


def _collect(out: dict[str, Array], grads: object) -> None:
    """Copies the gradients to where they belong, unless they are there already."""
    for name, grad in check_names(out, grads).items():
        view = out[name]
        if grad is not view:
            array = as_floats("gradients", name, grad)
            check_shape(name, array.shape, view.shape)
            with np.errstate(over="ignore"):  # too large for float32: infinity, which is refused
                np.copyto(view, array, casting="same_kind")


def _made(
    table: Mapping[str, Callable[..., Any]], what: str, name: str, options: Mapping[str, Any]
) -> Any:
    if name not in table:
        raise SpecError(f"no {what} {name!r}", remedy=f"use one of {', '.join(table)}")
    try:
        inspect.signature(table[name]).bind(**options)
    except TypeError as error:
        raise SpecError(f"{what} {name}: {error}") from None
    return table[name](**options)


_imported: set[str] = set()  # modules that came with user code


def forget() -> None:
    """Makes the next run import the user's code afresh: it may have changed since the last one."""
    for name in _imported:
        sys.modules.pop(name, None)
    _imported.clear()
    importlib.invalidate_caches()


def _import(kind: str, name: str, path: Path | None) -> tuple[ModuleType, str]:
    """The user's module, and what to call it in messages.

    `path` of a module is its top-level package or file; None when it is installed on this host.
    """
    before = set(sys.modules)
    try:
        if kind == "module":
            return _import_module(name, path), name
        if kind != "file" or path is None:
            raise SpecError(f"{kind!r} is not a kind of reference")
        return _import_file(path), path.name
    finally:
        if path is not None:
            _imported.update(each for each in set(sys.modules) - before if _is_below(each, path))


def _is_below(module: str, path: Path) -> bool:
    """Whether a loaded module came from the folder of `path`."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and path.resolve().parent in Path(file).resolve().parents


def _import_module(name: str, path: Path | None) -> ModuleType:
    if path is not None and str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        return importlib.import_module(name)
    except BaseException as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise UserCodeError(
                f"{name}: there is no such module on this host ({missing} is missing)",
                remedy="give the path of its file, or install it there and set env: existing",
            ) from error
        raise _raised(f"{name}: import", error) from error


def _import_file(path: Path) -> ModuleType:
    """Imports a file once per process.

    While it runs, its folder is the first on sys.path, as in `python file.py`; afterwards the last,
    so that late imports of its siblings work but hide nothing.
    """
    path = path.resolve()
    name = f"dsgd_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UserCodeError(f"{path.name}: there is no Python file at {path}")
    module = importlib.util.module_from_spec(spec)
    folder, wrote_bytecode = str(path.parent), sys.dont_write_bytecode
    sys.modules[name] = module  # dataclasses and the like look themselves up there
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise _raised(f"{path.name}: import", error) from error
    finally:
        sys.dont_write_bytecode = wrote_bytecode
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    return module


def _function(
    module: ModuleType,
    name: str,
    function: str,
    contract: Mapping[str, tuple[str, ...]] = CONTRACT,
) -> Callable[..., Any]:
    arguments = contract[function]
    call = f"{function}({', '.join(arguments)})"
    found = _found(module, function, f"{name}: there is no function {call}", call)
    written = {"out": "out"} if function == "gradients" and "out" in _parameters(found) else {}
    try:
        inspect.signature(found).bind(*arguments, **written)
    except TypeError as error:
        raise UserCodeError(
            f"{name}: {function} is called as {call}: {error}",
            remedy=f"it is {function}{inspect.signature(found)}",
        ) from None
    except ValueError:  # a function of C without a signature
        pass
    return found


def _found(module: ModuleType, name: str, absent: str, wanted: str) -> Callable[..., Any]:
    """What the user's module calls so. Raises UserCodeError: `absent`, and what may be meant."""
    found: Callable[..., Any] | None = getattr(module, name, None)
    if found is not None and callable(found):
        return found
    callables = [each for each, value in vars(module).items() if callable(value)]
    near = get_close_matches(name, callables, n=1)
    remedy = f"is {near[0]} meant to be it?" if near else f"define {wanted}"
    raise UserCodeError(absent, remedy=remedy)


def _parameters(function: Callable[..., Any]) -> Mapping[str, object]:
    try:
        return inspect.signature(function).parameters
    except ValueError:
        return {}


def _raised(where: str, error: BaseException) -> DsgdError:
    """What user code raised, with the traceback from their first line on."""
    if isinstance(error, DsgdError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    own = (*OWN_FILES, "<frozen")
    theirs = [frame for frame in frames if not frame.filename.startswith(own)]
    shown = traceback.format_list(theirs) + traceback.format_exception_only(type(error), error)
    lines = [line[:MOST_CHARS] for line in "".join(shown).splitlines()]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES // 2 : -MOST_LINES // 2] = ["  ..."]
    verb = "failed:" if where.endswith(": import") else "raised"
    what = " ".join(f"{type(error).__name__}: {_said(error)}"[:300].split())
    remedy = ""
    if isinstance(error, ModuleNotFoundError):
        remedy = (
            f"install {error.name} on the hosts and set env: existing, or send it along with"
            " `env: {requirements: requirements.txt}`"
        )
    details = [_encodable(line) for line in lines]
    return UserCodeError(_encodable(f"{where} {verb} {what}"), details=details, remedy=remedy)


def _shown(value: object) -> str:
    """A value of the user's in a message, which has to stay one."""
    return repr(value)[:100]


def _said(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "its text cannot be had"


def _encodable(text: str) -> str:
    """Without lone surrogates, as file names have them that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
