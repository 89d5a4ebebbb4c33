"""A `torch.nn.Module` in the contract of the models: parameters by name, gradients into `out`.

The module computes on the worker's own memory: each parameter's `data` is a view of what was
fetched, its `grad` one of the push buffer, where `backward` adds in place. Nothing is copied, but
on a GPU. The same views come again and again (a worker has two copies of each), so that what torch
makes of them is kept.

Buffers may not change in training (running statistics of BatchNorm): they are no parameters, so
each worker would have its own, made of its own examples, and the model that comes home none. What
does not change (a mask, positions, a frozen parameter) is the same everywhere, because every
process makes the module with the same seed; it stays out of the vector.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray

from dsgd_cli.contract.errors import UserCodeError
from dsgd_cli.learning.models import Functions

Array: TypeAlias = NDArray[Any]
Params: TypeAlias = Mapping[str, Array]

EVALUATE_ROWS = 1024  # examples at a time; metrics and loss see the outputs of all of them
KEPT = 4  # sets of views: those of a worker's copies, and a few besides


def functions(
    name: str,
    make: Callable[[], Any],
    loss: Callable[[Any, Any], Any] | None = None,
    transform: Callable[[Any, bool], Any] | None = None,
    metrics: Callable[[Any, Any], Any] | None = None,
) -> Functions:
    """The contract's functions; `make` is the class, or a function that returns a module."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal():
        torch.set_num_threads(int(threads))
    adapter = _Adapter(name, make, loss or default_loss, transform or _unchanged)
    chosen = metrics or default_metrics
    return Functions(
        adapter.init,
        adapter.predict,
        adapter.gradients,
        lambda params, x, y: adapter.metrics(chosen, params, x, y),
    )


def default_loss(outputs: Any, y: Any) -> Any:
    """Cross-entropy of scores (n, classes, ...) for labels that are integers, else mean squares."""
    if y.is_floating_point():
        same = outputs.numel() == y.numel()  # (n, 1) and (n,) must not be broadcast
        return torch.nn.functional.mse_loss(outputs.reshape(y.shape) if same else outputs, y)
    return torch.nn.functional.cross_entropy(outputs, y)


def default_metrics(outputs: Any, y: Any) -> dict[str, float]:
    """The accuracy, where outputs are scores per class."""
    if y.is_floating_point() or not isinstance(outputs, torch.Tensor) or outputs.ndim < 2:
        return {}
    guesses = outputs.argmax(dim=1)
    if outputs.shape[1] < 2 or guesses.shape != y.shape:
        return {}
    return {"accuracy": (guesses == y).double().mean().item()}


def device() -> str:
    """A GPU, if the launcher has assigned one (`slots: {gpu: …}`) and torch can use it."""
    assigned = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return "cuda" if assigned and torch.cuda.is_available() else "cpu"


class _Adapter:
    """One module, and where its parameters and gradients are."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Any],
        loss: Callable[[Any, Any], Any],
        transform: Callable[[Any, bool], Any],
    ) -> None:
        self._name = name
        self._make = make
        self._loss = loss
        self._transform = transform
        self._net: Any = None
        self._device = device()
        self._memory: Memory | None = None
        self._dtype: Any = None
        self._checked = False  # that buffers stay what they are

    def init(self, rng: np.random.Generator, example: tuple[Array, Array]) -> dict[str, Array]:
        """Makes the module, with torch's random numbers from the run's: the same everywhere.

        What is random in training is each worker's own, and the same again with the same seed.
        """
        seed = int(rng.integers(2**63))
        torch.manual_seed(seed)
        net = self._make()
        if not isinstance(net, torch.nn.Module):
            raise UserCodeError(
                f"{self._name} made a {type(net).__name__}, not a torch.nn.Module",
                remedy="name a subclass of torch.nn.Module, or a function that returns a module",
            )
        if any(torch.nn.parameter.is_lazy(parameter) for parameter in net.parameters()):
            with torch.no_grad():
                net.eval()(self._transform(_data(example[0], "cpu"), False))
        process = os.environ.get("DSGD_PROCESS", "")  # worker/3: its agent says so
        torch.manual_seed(seed ^ crc32(process.encode()))
        trained = {name: each for name, each in net.named_parameters() if each.requires_grad}
        for name, each in trained.items():
            if each.dtype not in (torch.float16, torch.float32, torch.float64):
                kind = str(each.dtype).removeprefix("torch.")
                raise UserCodeError(
                    f"{self._name}: the parameter {name} is {kind}, it must be float32 or float64"
                )
        self._net, self._memory, self._checked = net, None, False
        return {name: each.detach().cpu().numpy().copy() for name, each in trained.items()}

    def predict(self, params: Params, x: Array) -> Array:
        outputs = self._outputs(params, x)
        return np.asarray(outputs.numpy() if isinstance(outputs, torch.Tensor) else outputs)

    def metrics(
        self, metrics: Callable[[Any, Any], Any], params: Params, x: Array, y: Array
    ) -> object:
        """Loss and metrics over all examples at once: a perplexity is no mean of perplexities."""
        labels = _data(y, "cpu")
        outputs = self._outputs(params, x)
        with torch.no_grad():
            found = metrics(outputs, labels)
            if not isinstance(found, Mapping):
                return found  # the caller says what is wrong with it
            values = {"loss": self._loss(outputs, labels), **found}
        return {
            name: value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            for name, value in values.items()
        }

    def gradients(
        self, params: Params, x: Array, y: Array, out: dict[str, Array]
    ) -> tuple[float, dict[str, Array]]:
        memory = self._shown(params)
        if not self._net.training:
            self._net.train()
        before = None if self._checked else [each.clone() for each in self._net.buffers()]
        memory.clear(out)
        outputs = self._net(self._transform(_data(x, self._device), True))
        loss = self._loss(outputs, _data(y, self._device))
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise UserCodeError(
                f"{self._name}: the loss must be one number that depends on the parameters",
                remedy="return the mean over the batch as a tensor, without .item() or .detach()",
            )
        loss.backward()
        memory.collect(out)
        if before is not None:
            self._check_buffers(before)
        return loss.item(), out

    def _outputs(self, params: Params, x: Array) -> Any:
        """The module's outputs for all examples, in the CPU's memory, with nothing random."""
        self._shown(params)
        if self._net.training:
            self._net.eval()
        parts = []
        with torch.no_grad():
            for start in range(0, len(x), EVALUATE_ROWS):
                some = _data(x[start : start + EVALUATE_ROWS], self._device)
                parts.append(_moved(self._net(self._transform(some, False))))
        return _joined(parts)

    def _shown(self, params: Params) -> Memory:
        """Lets the module compute with these parameters, in their dtype."""
        assert self._net is not None, "init comes first"
        dtype = next(iter(params.values())).dtype
        if self._memory is None or self._dtype != dtype:
            self._net.to(device=self._device, dtype=torch.from_numpy(np.empty(0, dtype)).dtype)
            named = self._net.named_parameters()
            trained = {name: each for name, each in named if each.requires_grad}
            self._memory = Shared(trained) if self._device == "cpu" else Copied(trained)
            self._dtype = dtype
        self._memory.show(params)
        return self._memory

    def _check_buffers(self, before: Sequence[Any]) -> None:
        for (name, after), old in zip(self._net.named_buffers(), before, strict=True):
            if not torch.equal(old, after):
                raise UserCodeError(
                    f"{self._name}: the buffer {name} changes in training, and each worker would"
                    " have its own",
                    remedy="BatchNorm: track_running_stats=False; or use GroupNorm, LayerNorm",
                )
        self._checked = True


# ── where parameters and gradients are ─────────────────────────────────────────────────────────


class Memory(ABC):
    """Brings a worker's views and a module's parameters together, by name."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = list(parameters.values())
        self._params, self._grads = _Wrapped(list(parameters)), _Wrapped(list(parameters))

    @abstractmethod
    def show(self, params: Params) -> None:
        """The module computes with these from now on."""

    @abstractmethod
    def clear(self, out: Params) -> None:
        """Before `backward`."""

    @abstractmethod
    def collect(self, out: Params) -> None:
        """After it: the gradients are in `out`, 0 where a parameter was not used."""


class Shared(Memory):
    """One memory for both: the module's parameters and gradients are the views."""

    def show(self, params: Params) -> None:
        for parameter, tensor in zip(self._parameters, self._params.of(params), strict=True):
            parameter.data = tensor

    def clear(self, out: Params) -> None:
        for parameter, tensor in zip(self._parameters, self._grads.of(out), strict=True):
            parameter.grad = tensor.zero_()

    def collect(self, out: Params) -> None:
        for parameter, tensor in zip(self._parameters, self._grads.of(out), strict=True):
            if parameter.grad is not tensor:  # somebody's hook has put another one there
                tensor.copy_(torch.zeros_like(tensor) if parameter.grad is None else parameter.grad)


class Copied(Memory):
    """The module's parameters and gradients are elsewhere, on a GPU."""

    def show(self, params: Params) -> None:
        for parameter, tensor in zip(self._parameters, self._params.of(params), strict=True):
            parameter.data.copy_(tensor)

    def clear(self, out: Params) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def collect(self, out: Params) -> None:
        for parameter, tensor in zip(self._parameters, self._grads.of(out), strict=True):
            if parameter.grad is None:
                tensor.zero_()
            else:
                tensor.copy_(parameter.grad)


class _Wrapped:
    """The tensors of the last few sets of arrays. They keep the arrays, so that an id is theirs."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._sets: dict[tuple[int, ...], tuple[list[Array], list[Any]]] = {}

    def of(self, arrays: Params) -> list[Any]:
        """A tensor for each array, in the same memory."""
        views = [arrays[name] for name in self._names]
        key = tuple(map(id, views))
        if key not in self._sets:
            if len(self._sets) == KEPT:
                del self._sets[next(iter(self._sets))]
            with warnings.catch_warnings():  # torch has no read-only tensors; nothing writes there
                warnings.filterwarnings("ignore", ".*not writable", UserWarning)
                self._sets[key] = views, [torch.from_numpy(array) for array in views]
        return self._sets[key][1]


def _data(array: Array, where: str) -> Any:
    """Examples or labels; integers are int64, as torch wants labels. Read-only ones are copied."""
    if array.dtype.kind in "iu":
        array = array.astype(np.int64, copy=False)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor if where == "cpu" else tensor.to(where)


def _moved(outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs.cpu()
    return tuple(map(_moved, outputs)) if isinstance(outputs, tuple) else outputs


def _joined(parts: Sequence[Any]) -> Any:
    """Outputs of several batches as those of one; a tuple's members one by one."""
    if isinstance(parts[0], tuple):
        return tuple(map(_joined, zip(*parts, strict=True)))
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _unchanged(x: Any, train: bool) -> Any:
    return x
