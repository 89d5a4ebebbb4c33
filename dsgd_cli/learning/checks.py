"""What may come out of user code, and the sentence that says what is wrong with it.

Each check names the function, the array, what was found and what was expected. Nothing is repaired
in silence: only floats of another width are cast, by whoever copies them into the run's vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.datasets import Dataset, pieces
from dsgd_cli.learning.pixels import Pixels

RESERVED = "__metadata__"  # safetensors' own


def check_initial(params: object) -> dict[str, NDArray[Any]]:
    """`init`'s result as arrays. Raises UserCodeError."""
    if not isinstance(params, Mapping):
        raise UserCodeError(f"init must return a dict of arrays, it returned {_kind(params)}")
    if not params:
        raise UserCodeError("init returned no arrays")
    arrays = {}
    for name, value in params.items():
        if not isinstance(name, str) or not name.isprintable() or name in ("", RESERVED):
            raise UserCodeError(f"init: {name!r} cannot be the name of an array")
        arrays[name] = as_floats("init", name, value)
        check_finite("init", name, arrays[name])
    if all(array.size == 0 for array in arrays.values()):
        raise UserCodeError("init returned only empty arrays")
    return arrays


def check_loss(loss: object) -> float:
    """The loss as a float, which may be NaN."""
    array = np.asarray(loss)
    if array.size != 1 or array.dtype.kind not in "fiu":
        raise UserCodeError(f"gradients: the loss must be a number, it is {_kind(loss)}")
    return float(array.reshape(-1)[0])


def check_names(params: Mapping[str, Any], grads: object) -> Mapping[str, Any]:
    """That `gradients` returned one array per parameter."""
    if not isinstance(grads, Mapping):
        raise UserCodeError(
            f"gradients must return (loss, dict of arrays), the second is {_kind(grads)}"
        )
    if missing := [name for name in params if name not in grads]:
        raise UserCodeError(f"gradients: no {', '.join(missing)}; init made {', '.join(params)}")
    if extra := [str(name) for name in grads if name not in params]:
        raise UserCodeError(f"gradients: {', '.join(extra)} not made by init")
    return grads


def check_gradients(params: Mapping[str, NDArray[Any]], loss: object, grads: object) -> None:
    """All of it at once, with finiteness: what a probe asks."""
    if not np.isfinite(check_loss(loss)):
        raise UserCodeError(f"gradients: the loss is {check_loss(loss)}")
    for name, grad in check_names(params, grads).items():
        array = as_floats("gradients", name, grad)
        check_shape(name, array.shape, params[name].shape)
        check_finite("gradients", name, array)


def as_floats(function: str, name: str, value: object) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserCodeError(f"{function}: {name} is not an array: {error}") from error
    if array.dtype.kind != "f":
        raise UserCodeError(f"{function}: {name} has dtype {array.dtype}, it must be float")
    return array


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise UserCodeError(f"gradients: {name} has shape {shape}, init made {expected}")


def check_finite(function: str, name: str, array: NDArray[Any]) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        place = np.unravel_index(int(np.argmin(finite)), array.shape)
        at = f"[{', '.join(str(int(i)) for i in place)}]" if array.ndim else ""
        count = array.size - np.count_nonzero(finite)
        raise UserCodeError(
            f"{function}: {name}{at} is {array[place]} ({count} of {array.size} are not finite)"
        )


def check_dataset(data: Dataset) -> Dataset:
    """That the four arrays fit each other and hold numbers. Raises UserCodeError."""
    for name in ("x", "y", "x_test", "y_test"):
        array = getattr(data, name)
        if not isinstance(array, np.ndarray | Pixels):
            raise UserCodeError(f"{data.name}: {name} is {_kind(array)}, it must be an array")
        if array.dtype.kind not in "fiub":
            raise UserCodeError(
                f"{data.name}: {name} has dtype {array.dtype}, it must hold numbers"
            )
        if array.ndim == 0:
            raise UserCodeError(f"{data.name}: {name} is a single number, it must be an array")
    for x, y in (("x", "y"), ("x_test", "y_test")):
        many, labels = len(getattr(data, x)), len(getattr(data, y))
        if many != labels:
            raise UserCodeError(f"{data.name}: {many} examples in {x}, but {labels} in {y}")
        if many == 0:
            raise UserCodeError(f"{data.name}: {x} has no examples")
    for train, test in ((data.x, data.x_test), (data.y, data.y_test)):
        name = "x" if train is data.x else "y"
        if train.shape[1:] != test.shape[1:]:
            raise UserCodeError(
                f"{data.name}: an example of {name} has shape {train.shape[1:]}, "
                f"one of {name}_test {test.shape[1:]}"
            )
    if data.x[0].size == 0:
        raise UserCodeError(
            f"{data.name}: an example of x has shape {data.x.shape[1:]}: no numbers"
        )
    for name in ("x", "y", "x_test", "y_test"):
        array = getattr(data, name)
        if isinstance(array, Pixels) or array.dtype.kind != "f":
            continue
        if not all(np.isfinite(array[rows]).all() for rows in pieces(array)):
            check_finite(data.name, name, array)
    return data


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__}"
