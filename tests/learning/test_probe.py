"""The probe: what can be known before a run starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.adapters import Model, load_data, load_model
from dsgd_cli.learning.datasets import Dataset
from dsgd_cli.learning.models import Functions
from dsgd_cli.learning.probe import probe

Array = np.ndarray[Any, Any]
DATA = Dataset("d", np.ones((8, 3)), np.arange(8) % 2, np.ones((2, 3)), np.arange(2))


def init(rng: Any, example: tuple[Array, Array]) -> dict[str, Array]:
    return {"W": np.ones((example[0].shape[1], 2)), "b": np.zeros(2)}


def predict(params: Any, x: Array) -> Array:
    return x @ params["W"] + params["b"]  # type: ignore[no-any-return]


def zero(params: Any, x: Array, y: Array) -> Any:
    return 1.0, {name: np.zeros_like(array) for name, array in params.items()}


def probed(gradients: Any, takes_out: bool = False, **other: Any) -> Any:
    functions = Functions(init, predict, gradients)._replace(**other)
    return probe(Model("m", functions, takes_out), DATA, seed=0, dtype="float32", batch_size=4)


def test_what_a_run_will_have() -> None:
    found = probed(zero)
    assert found.tensors == (("W", (3, 2)), ("b", (2,)))
    assert (found.dtype, found.examples, found.loss) == ("float32", 8, 1.0)
    assert found.metrics == {"loss": 1.0, "accuracy": 0.5}


@pytest.mark.parametrize("name", ["mlp", "softmax"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_builtins_pass(name: str, dtype: str) -> None:
    data = load_data("builtin", "digits").as_dtype(dtype)
    found = probe(load_model("builtin", name), data, 1, dtype, 32)
    assert (
        found.examples == 1437
        and found.dtype == dtype
        and set(found.metrics) == {"loss", "accuracy"}
    )


def test_nan_at_once() -> None:
    with pytest.raises(UserCodeError, match="m: gradients: the loss is nan"):
        probed(lambda p, x, y: (np.nan, zero(p, x, y)[1]))
    with pytest.raises(UserCodeError, match=r"m: gradients: b\[1\] is nan \(1 of 2"):
        probed(lambda p, x, y: (1.0, {"W": np.zeros((3, 2)), "b": np.array([0, np.nan])}))


def test_an_out_that_is_not_written() -> None:
    def gradients(params: Any, x: Array, y: Array, out: dict[str, Array]) -> Any:
        out["b"][...] = 0
        return 1.0, out

    with pytest.raises(UserCodeError, match=r"m: gradients\(out=\) wrote nothing to W") as caught:
        probed(gradients, takes_out=True)
    assert "out[name][...]" in caught.value.remedy


def test_a_function_that_changes_the_parameters_fails_on_its_own_line(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        "import numpy as np\n"
        "def init(rng, example): return {'W': np.ones(3)}\n"
        "def predict(params, x): return x\n"
        "def gradients(params, x, y):\n"
        "    params['W'] -= 0.1\n"
        "    return 1.0, {'W': np.zeros(3)}\n"
    )
    with pytest.raises(UserCodeError, match="read-only") as caught:
        probe(load_model("file", path=path), DATA, 0, "float32", 4)
    assert any("params['W'] -= 0.1" in line for line in caught.value.details)


def test_predict_and_metrics_are_tried() -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no")

    with pytest.raises(UserCodeError, match="m: predict raised ValueError: no"):
        probed(zero, predict=broken)
    with pytest.raises(UserCodeError, match="m: metrics raised ValueError: no"):
        probed(zero, metrics=broken)


def test_the_seed_and_the_example_reach_init() -> None:
    seen = []

    def init_random(rng: np.random.Generator, example: tuple[Array, Array]) -> dict[str, Array]:
        seen.append((rng.random(), len(example[0])))
        return init(rng, example)

    for _ in range(2):
        probed(zero, init=init_random)
    assert seen == [(np.random.default_rng(0).random(), 4)] * 2
