"""What the README says is so."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dsgd_cli.contract import errors
from dsgd_cli.launcher.describe import fields_table
from dsgd_cli.launcher.load import load
from dsgd_cli.learning.adapters import forget, load_data, load_model
from dsgd_cli.learning.probe import probe

README = (Path(__file__).parents[1] / "README.md").read_text()


def code(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_fields_are_those_of_the_specification() -> None:
    table = README.split("<!-- fields -->")[1].split("<!-- /fields -->")[0]
    assert table.strip() == fields_table().strip()


def test_the_exit_codes_are_those_of_the_errors() -> None:
    table = README.split("| exit code | meaning |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    said = {int(number) for row in rows for number in row.split(",")}
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    raised = {each.exit_code for each in classes if issubclass(each, errors.DsgdError)}
    assert raised <= said
    assert said >= {0, 2, 124, 130, 131, 143}


def test_the_two_host_example_is_valid_as_printed(tmp_path: Path) -> None:
    example = next(block for block in code("yaml") if "name: lab" in block)
    path = tmp_path / "cluster.yaml"
    path.write_text(example)
    spec = load(path).spec
    assert [host.name for host in spec.hosts] == ["gpu1", "gpu2"]
    assert (spec.servers.count, spec.workers.count) == (2, 4)


def test_the_model_contract_example_has_the_right_gradient(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(next(block for block in code("python") if "def gradients" in block))
    model = load_model("file", path=path)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 5)), rng.integers(0, 10, 8)
    params = model.init(rng, (x, y))
    out = {name: np.zeros_like(array) for name, array in params.items()}
    scratch = {name: np.zeros_like(array) for name, array in params.items()}
    model.gradients(params, x, y, out)
    for name, at in (("W", (2, 3)), ("b", (7,))):
        values = []
        for step in (1e-6, -1e-6):
            moved = {key: array.copy() for key, array in params.items()}
            moved[name][at] += step
            values.append(model.gradients(moved, x, y, scratch))
        assert out[name][at] == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)
    forget()


@pytest.mark.torch
def test_the_module_of_torchs_is_one_for_the_digits(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed: `make test-torch`")
    path = tmp_path / "net.py"
    path.write_text(next(block for block in code("python") if "class Net(nn.Module)" in block))
    assert "model: {torch: net.py:Net}" in README
    data = load_data("builtin", "digits").as_dtype("float32")
    found = probe(load_model("torch", "Net", path=path), data, 0, "float32", 8)
    assert set(found.metrics) == {"loss", "accuracy"}
    forget()
