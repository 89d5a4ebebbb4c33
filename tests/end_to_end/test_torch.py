"""`dsgd train` with a module of torch's, and what it says where torch is missing."""

from __future__ import annotations

import math
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.end_to_end.conftest import User

NET = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
"""
CLUSTER = """
name: NAME
servers: 2
workers: 2
train:
  model: {torch: "net.py:net"}
  data: digits
  until: {accuracy: 0.95, max_epochs: 40}
"""


TEMPLATES = Path(__file__).parents[2] / "cluster_templates"
needs_torch = pytest.mark.skipif(
    find_spec("torch") is None, reason="torch is not installed: `make test-torch`"
)


@pytest.mark.torch
@needs_torch
def test_a_module_converges_and_comes_home_by_its_own_names(user: User) -> None:
    user.write(NET, "net.py")
    user.write(CLUSTER)
    run = user.dsgd("train", "cluster.yaml", "--json", timeout_s=110)
    assert run.code == 0, run.err
    assert run.summary["value"] >= 0.95
    params = load_file(user.folder / run.summary["run_dir"] / "model.safetensors")
    shapes = {name: array.shape for name, array in params.items()}
    assert shapes == {
        "0.weight": (64, 64),
        "0.bias": (64,),
        "2.weight": (10, 64),
        "2.bias": (10,),
    }
    user.assert_nothing_left()


@pytest.mark.torch
@pytest.mark.slow
@needs_torch
def test_the_template_learns_to_write_backwards_in_less_than_a_minute(user: User) -> None:
    for path in TEMPLATES.glob("seq2seq*"):
        shutil.copy(path, user.folder)
    run = user.dsgd(
        *("train", "seq2seq.yaml", "--json", "--set", f"name={user.name}"), timeout_s=100
    )
    assert run.code == 0, run.err
    evaluations = [r for r in user.metrics(run.summary["run_dir"]) if r["kind"] == "evaluate"]
    last = evaluations[-1]
    assert last["accuracy"] >= 0.97
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]), rel=1e-5)
    assert last["perplexity"] < 1.2
    assert run.summary["phases"]["train"] < 60
    user.assert_nothing_left()


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_nothing_starts_and_the_remedy_is_named(user: User) -> None:
    user.write(NET, "net.py")
    user.write(CLUSTER)
    run = user.dsgd("train", "cluster.yaml")
    assert run.code == 6
    assert "torch is not installed" in run.err and "pip install torch" in run.err
    user.assert_nothing_left()
