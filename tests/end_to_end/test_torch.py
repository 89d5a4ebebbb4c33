"""`dsgd train` with a module of torch's, and what it says where torch is missing."""

from __future__ import annotations

from importlib.util import find_spec

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


@pytest.mark.torch
@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed: `make test-torch`")
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


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed")
def test_without_torch_nothing_starts_and_the_remedy_is_named(user: User) -> None:
    user.write(NET, "net.py")
    user.write(CLUSTER)
    run = user.dsgd("train", "cluster.yaml")
    assert run.code == 6
    assert "torch is not installed" in run.err and "pip install torch" in run.err
    user.assert_nothing_left()
