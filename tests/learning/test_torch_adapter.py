"""Modules of torch's: on the worker's own memory, and the same as torch trains them."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.daemons.parameters import Buffer, Copy
from dsgd_cli.engine.layout import cut, flatten
from dsgd_cli.engine.optimizers import make
from dsgd_cli.engine.shard import Shard
from dsgd_cli.learning.adapters import Model, load_data, load_model
from dsgd_cli.learning.evaluate import evaluate
from dsgd_cli.learning.probe import probe

torch = pytest.importorskip("torch", reason="torch is not installed: `make test-torch`")

from dsgd_cli.learning import torch_adapter  # noqa: E402

pytestmark = pytest.mark.torch
Array = np.ndarray[Any, Any]

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.second = nn.Linear(16, 10)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))
"""
DATA = load_data("builtin", "digits").as_dtype("float32")


@pytest.fixture(autouse=True)
def as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # torch's own optimizers make this folder, by default below the system's temporary one
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    threads, path = torch.get_num_threads(), list(sys.path)
    yield
    torch.set_num_threads(threads)
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("dsgd_user_")]:
        del sys.modules[name]


def model_of(tmp_path: Path, text: str = NET, name: str = "Net") -> Model:
    path = tmp_path / f"net{len(list(tmp_path.iterdir()))}.py"
    path.write_text(text)
    return load_model("torch", name, path=path)


def initial(model: Model, dtype: str = "float32", data: Any = DATA) -> dict[str, Array]:
    made = model.init(np.random.default_rng(3), data.example(8))
    return {name: array.astype(dtype) for name, array in made.items()}


def buffers(params: dict[str, Array]) -> dict[str, Array]:
    return {name: np.full_like(array, np.nan) for name, array in params.items()}


def net_of(model: Model) -> Any:
    """The module inside."""
    return model.functions.init.__self__._net  # type: ignore[attr-defined]


# ---- the same as torch


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fifty_steps_with_one_worker_are_those_of_torch(tmp_path: Path, dtype: str) -> None:
    model, data = model_of(tmp_path), DATA.as_dtype(dtype)
    first = initial(model, dtype)
    layout = cut([(n, a.shape) for n, a in first.items()], dtype, 2, max_block_bytes=1024)
    vector = np.empty(layout.size, dtype)
    flatten(layout, first, vector)
    sgd = make("sgd", {"learning_rate": 0.1}, dtype)
    shards = [
        Shard(vector[s.start : s.stop].copy(), layout.block_elements, sgd) for s in layout.shards
    ]
    shown, push = Copy(layout), Buffer(layout)
    shown.flat[:] = vector

    namespace: dict[str, Any] = {}
    exec(compile(NET, "net", "exec"), namespace)
    torch.manual_seed(int(np.random.default_rng(3).integers(2**63)))
    reference = namespace["Net"]().to(torch.from_numpy(vector).dtype)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)

    for seq in range(1, 51):
        rows = np.arange(seq, seq + 32)
        x, y = data.x[rows], data.y[rows]
        loss = model.gradients(shown.views, x, y, push.views)
        for held, shard in zip(layout.shards, shards, strict=True):
            for block in range(shard.blocks):
                start, stop = layout.bounds(held.first_block + block)
                assert shard.apply(0, 1, seq, block, push.flat[start:stop])
                shown.flat[start:stop] = np.frombuffer(shard.read(block), dtype)
        optimizer.zero_grad()
        expected = torch.nn.functional.cross_entropy(
            reference(torch.from_numpy(x)), torch.from_numpy(y.astype("int64"))
        )
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(shown.views[name], parameter.detach().numpy(), atol=1e-5)


def test_parameters_and_gradients_are_in_the_workers_memory(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    first = initial(model)
    layout = cut([(n, a.shape) for n, a in first.items()], "float32", 2)
    copies, pushes = [Copy(layout), Copy(layout)], [Buffer(layout), Buffer(layout)]
    for copy in copies:
        flatten(layout, first, copy.flat)
    seen = []
    for i in range(6):  # as a worker alternates between its copies
        shown, push = copies[i % 2], pushes[i % 2]
        model.gradients(shown.views, DATA.x[:8], DATA.y[:8], push.views)
        for name, parameter in net_of(model).named_parameters():
            assert parameter.data_ptr() == shown.views[name].ctypes.data
            assert parameter.grad.data_ptr() == push.views[name].ctypes.data
            assert parameter.grad.abs().sum() > 0
        seen.append([id(parameter.grad) for parameter in net_of(model).parameters()])
    assert seen[0] == seen[2] == seen[4] and seen[1] == seen[3]  # made once for each copy
    np.testing.assert_array_equal(pushes[0].flat, pushes[1].flat)
    copies[0].flat[:] = 0.0  # what the next fetch brings is what the module computes with
    assert model.predict(copies[0].views, DATA.x[:2]).tolist() == [[0.0] * 10] * 2


def test_every_process_makes_the_same_module(tmp_path: Path) -> None:
    one, other = initial(model_of(tmp_path)), initial(model_of(tmp_path))
    assert list(one) == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert all(np.array_equal(one[name], other[name]) for name in one)
    third = model_of(tmp_path).init(np.random.default_rng(4), DATA.example(8))
    assert (third["first.weight"] != one["first.weight"]).any()


def test_views_that_are_new_each_time_are_never_mistaken_for_older_ones(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    params = initial(model)
    for scale in range(9):  # more than are kept; freed memory is soon somebody else's
        scaled = {name: array * scale for name, array in params.items()}
        out = buffers(params)
        model.gradients(scaled, DATA.x[:8], DATA.y[:8], out)
        fresh = model_of(tmp_path)
        initial(fresh)
        expected = buffers(params)
        fresh.gradients(scaled, DATA.x[:8], DATA.y[:8], expected)
        for name in params:
            np.testing.assert_array_equal(out[name], expected[name])


# ---- what a module may be


def test_a_probe_and_an_evaluation(tmp_path: Path) -> None:
    model = model_of(tmp_path)
    found = probe(model, DATA, 0, "float32", 16)
    assert found.tensors[0] == ("first.weight", (16, 64))
    assert set(found.metrics) == {"loss", "accuracy"}
    params = initial(model)
    scores = model.predict(params, DATA.x_test)
    values = evaluate(model, params, DATA.x_test, DATA.y_test)
    assert values["accuracy"] == np.mean(scores.argmax(axis=1) == DATA.y_test)
    loss = model.gradients(params, DATA.x_test, DATA.y_test, buffers(params))
    assert values["loss"] == pytest.approx(loss, rel=1e-5)


def test_loss_transform_and_metrics_of_ones_own(tmp_path: Path) -> None:
    model = model_of(
        tmp_path,
        NET
        + """
modes = []

def transform(x, train):
    modes.append(train)
    return 2 * x

def loss(outputs, y):
    return ((outputs.argmax(1) != y).double() + outputs.square().sum()).mean()

def metrics(outputs, y):
    return {"spread": outputs.std(), "n": len(y), "mode": len(modes)}
""",
    )
    params = initial(model)
    assert model.gradients(params, DATA.x[:8], DATA.y[:8], buffers(params)) > 0
    chunks = -(-len(DATA.x_test) // torch_adapter.EVALUATE_ROWS)
    values = model.metrics(params, DATA.x_test, DATA.y_test)
    assert values["n"] == len(DATA.x_test) and values["mode"] == 1 + chunks
    doubled = model.predict(params, DATA.x_test)
    assert values["spread"] == pytest.approx(doubled.std(ddof=1), rel=1e-5)
    assert sys.modules[net_of(model).__class__.__module__].modes[:2] == [True, False]


def test_a_regression_has_mean_squares_and_no_accuracy(tmp_path: Path) -> None:
    line = "from torch import nn\ndef line():\n    return nn.Linear(3, 1)\n"
    model = model_of(tmp_path, line, "line")
    x = np.arange(12, dtype="float32").reshape(4, 3)
    y = np.array([1, 2, 3, 5], "float32")
    params = {n: a.copy() for n, a in model.init(np.random.default_rng(0), (x, y)).items()}
    values = evaluate(model, params, x, y)
    assert list(values) == ["loss"]
    assert values["loss"] == pytest.approx(((model.predict(params, x)[:, 0] - y) ** 2).mean())
    out = buffers(params)
    assert model.gradients(params, x, y, out) == pytest.approx(values["loss"])
    error = model.predict(params, x)[:, 0] - y
    np.testing.assert_allclose(out["weight"][0], 2 * error @ x / 4, rtol=1e-5)


def test_lazy_modules_learn_their_sizes_from_the_example(tmp_path: Path) -> None:
    model = model_of(
        tmp_path, "from torch import nn\ndef net():\n    return nn.LazyLinear(10)\n", "net"
    )
    assert initial(model)["weight"].shape == (10, 64)


def test_what_is_not_used_has_the_gradient_zero_and_what_is_frozen_none(tmp_path: Path) -> None:
    more = "        self.unused = nn.Linear(2, 2)\n        self.first.bias.requires_grad = False\n"
    model = model_of(tmp_path, NET.replace("\n    def forward", f"{more}\n    def forward"))
    params = initial(model)
    assert "first.bias" not in params
    out = buffers(params)
    for _ in range(2):
        model.gradients(params, DATA.x[:8], DATA.y[:8], out)
        assert (out["unused.weight"] == 0).all() and (out["second.bias"] != 0).any()


def test_what_is_random_in_training_is_not_in_an_evaluation(tmp_path: Path) -> None:
    dropped = "nn.functional.dropout(self.first(x), 0.5, self.training)"
    model = model_of(tmp_path, NET.replace("torch.tanh(self.first(x))", dropped))
    params = initial(model)
    losses = {model.gradients(params, DATA.x[:8], DATA.y[:8], buffers(params)) for _ in range(3)}
    assert len(losses) == 3
    assert len({model.predict(params, DATA.x[:8]).tobytes() for _ in range(3)}) == 1


def test_dropout_differs_between_workers_and_not_between_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = "nn.functional.dropout(self.first(x), 0.5, self.training)"
    losses, first = [], []
    for process in ("worker/0", "worker/1", "worker/0"):
        monkeypatch.setenv("DSGD_PROCESS", process)
        model = model_of(tmp_path, NET.replace("torch.tanh(self.first(x))", dropped))
        params = initial(model)
        first.append(params["first.weight"].tobytes())
        losses.append(model.gradients(params, DATA.x[:8], DATA.y[:8], buffers(params)))
    assert len(set(first)) == 1
    assert losses[0] == losses[2] != losses[1]


def test_a_recurrent_and_a_convolutional_module(tmp_path: Path) -> None:
    model = model_of(
        tmp_path,
        """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.gru = nn.GRU(32, 8, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.conv(x.reshape(-1, 1, 8, 8)).relu()
        return self.head(self.gru(x.permute(0, 2, 1, 3).flatten(2))[0][:, -1])
""",
    )
    params = initial(model, "float64", DATA.as_dtype("float64"))
    x, y, out = DATA.x[:8].astype("float64"), DATA.y[:8], buffers(params)
    model.gradients(params, x, y, out)
    unused = buffers(params)
    for name, at in (("conv.weight", (1, 0, 1, 2)), ("gru.weight_hh_l0", (3, 4))):
        losses = []
        for step in (1e-6, -1e-6):
            moved = {key: array.copy() for key, array in params.items()}
            moved[name][at] += step
            losses.append(model.gradients(moved, x, y, unused))
        assert out[name][at] == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_tuples_are_for_a_loss_of_ones_own(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch_adapter, "EVALUATE_ROWS", 100)
    model = model_of(
        tmp_path,
        NET.replace("return self.second", "return x, self.second") + "\ndef loss(outputs, y):\n"
        "    return nn.functional.cross_entropy(outputs[1], y)\n",
    )
    params = initial(model)
    same = model_of(tmp_path)
    initial(same)
    mine = evaluate(model, params, DATA.x_test, DATA.y_test)
    assert list(mine) == ["loss"]
    assert mine["loss"] == evaluate(same, params, DATA.x_test, DATA.y_test)["loss"]


def test_torch_has_the_threads_of_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    model_of(tmp_path)
    assert torch.get_num_threads() == 3


# ---- a GPU, as far as there is none


def test_a_gpu_is_used_when_one_was_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for assigned, device in (("", "cpu"), ("0", "cuda"), (None, "cpu")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if assigned is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", assigned)
        assert torch_adapter.device() == device
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_adapter.device() == "cpu"


def test_what_is_elsewhere_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the module in memory of its own, as on a GPU; its results are the same."""
    text = NET.replace(
        "        self.second", "        self.no = nn.Linear(1, 1)\n        self.second"
    )
    here, there = model_of(tmp_path, text), model_of(tmp_path, text)
    params = initial(here)
    expected, out = buffers(params), buffers(params)
    here.gradients(params, DATA.x[:8], DATA.y[:8], expected)
    monkeypatch.setattr(torch_adapter, "Shared", torch_adapter.Copied)
    initial(there)
    for _ in range(2):
        there.gradients(params, DATA.x[:8], DATA.y[:8], out)
        for name in params:
            np.testing.assert_array_equal(out[name], expected[name])
    for name, parameter in net_of(there).named_parameters():
        assert parameter.data_ptr() != params[name].ctypes.data


# ---- what is refused


BATCHNORM = NET.replace("nn.Linear(64, 16)", "nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16))")


def with_parameter(dtype: str) -> str:
    return NET.replace(
        "\n    def forward",
        f"        self.odd = nn.Parameter(torch.zeros(3, dtype=torch.{dtype}))\n\n    def forward",
    )


@pytest.mark.parametrize(
    ("text", "name", "message", "remedy"),
    [
        (NET, "Nett", r"net0.py: there is no Nett", "is Net meant"),
        (NET, "Nothing", r"net0.py: there is no Nothing", "define a class Nothing"),
        ("Net = dict", "Net", "net0.py:Net made a dict, not a torch.nn.Module", "subclass"),
        (
            NET.replace("__init__(self)", "__init__(self, hidden)"),
            "Net",
            "net0.py:Net is called without arguments: missing a required argument: 'hidden'",
            "defaults",
        ),
        (with_parameter("bfloat16"), "Net", "the parameter odd is bfloat16", ""),
        (with_parameter("complex64"), "Net", "the parameter odd is complex64", ""),
        (BATCHNORM, "Net", "the buffer first.1.running_mean changes in training", "GroupNorm"),
        (
            NET + "\ndef loss(outputs, y):\n    return outputs\n",
            "Net",
            "the loss must be one number that depends on the parameters",
            "mean over the batch",
        ),
        (
            NET + "\ndef loss(outputs, y):\n    return outputs.sum().item()\n",
            "Net",
            "the loss must be one number that depends on the parameters",
            "without .item",
        ),
        (
            NET + "\ndef loss(outputs):\n    pass\n",
            "Net",
            r"loss is called as loss\(outputs, y\)",
            "",
        ),
        (NET.replace("16, 10", "17, 10"), "Net", "Net: gradients raised RuntimeError: mat1", ""),
        (NET + "\ndef metrics(outputs, y):\n    return 3\n", "Net", "must return a dict", ""),
    ],
)
def test_what_cannot_be_trained_is_named(
    tmp_path: Path, text: str, name: str, message: str, remedy: str
) -> None:
    with pytest.raises(UserCodeError, match=message) as refusal:
        probe(model_of(tmp_path, text, name), DATA, 0, "float32", 8)
    assert remedy in refusal.value.remedy
    assert not any("torch_adapter.py" in line for line in refusal.value.details)


def test_batchnorm_without_running_statistics_is_trained(tmp_path: Path) -> None:
    text = BATCHNORM.replace("BatchNorm1d(16)", "BatchNorm1d(16, track_running_stats=False)")
    assert math.isfinite(probe(model_of(tmp_path, text), DATA, 0, "float32", 8).loss)
