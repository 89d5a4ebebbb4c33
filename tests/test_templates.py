"""The templates: each loads without a note, can be placed, and is what its name says."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dsgd_cli.contract.options import ALGORITHMS
from dsgd_cli.launcher.load import load
from dsgd_cli.launcher.placement import place
from dsgd_cli.launcher.sweep import Cell, cells, grid
from dsgd_cli.learning.adapters import load_data, load_model

FOLDER = Path(__file__).parents[1] / "cluster_templates"
TEMPLATES = sorted(FOLDER.glob("*.yaml"))


def test_all_of_them_are_there() -> None:
    names = [path.stem for path in TEMPLATES]
    assert names == [
        "caltech101",
        "convnet",
        "distbelief",
        "downpour",
        "localhost",
        "own-model",
        "sandblaster",
        "seq2seq",
        "ssh-localhost",
        "ssh-two-hosts",
        "stale-synchronous",
        "synchronous",
    ]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_one_that_names_all_its_options(name: str) -> None:
    path = FOLDER / f"{name.replace('_', '-')}.yaml"
    assert load(path).spec.train.algorithm.name == name
    text = path.read_text()
    unused = {"name", "local_learning_rate"}  # which is for few
    assert [
        option for option in {*ALGORITHMS[name].model_fields} - unused if option not in text
    ] == []


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_loads_and_can_be_placed(path: Path) -> None:
    made = load(path)
    assert made.notes == ()
    assert made.spec.train.until.has_target
    placed = place(made.spec)
    assert len(placed) == 1 + made.spec.servers.count + made.spec.workers.count
    assert {item.host for item in placed} == {host.name for host in made.spec.hosts}
    local = {host.transport for host in made.spec.hosts} == {"local"}
    assert local == (not path.name.startswith("ssh-"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_what_is_commented_out_is_valid_too(path: Path, tmp_path: Path) -> None:
    lines = []
    for line in path.read_text().splitlines():
        bare = line.lstrip()
        if bare.startswith("# ") and line != bare and ":" in bare.split()[1]:
            line = line.replace("# ", "", 1).replace("SHA256:…", f"SHA256:{'A' * 43}")
        lines.append(line)
    file = tmp_path / path.name
    file.write_text("\n".join(lines))
    for model in FOLDER.glob("*.py"):
        (tmp_path / model.name).write_bytes(model.read_bytes())
    load(file)


@pytest.mark.parametrize(
    ("target", "runs"),
    [
        (["figures-distbelief"], [9]),
        (["figures-distbelief", "WORKERS=1,2,4,8", "HOSTS=gpu[01-16]", "OPTIONS=seed=0,1"], [24]),
        (["figures-seed"], [3, 3]),
        (["figures-seed", f"CALTECH={FOLDER}", "WORKERS=2,8"], [2, 2]),
    ],
)
def test_the_figures_of_others_are_sweeps_that_can_be(target: list[str], runs: list[int]) -> None:
    command = ["make", "-n", "-C", str(FOLDER.parent), *target]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = said.replace("\\\n", "").splitlines()
    made = [cells_of(shlex.split(line)[2:]) for line in lines if "bin/dsgd sweep" in line]
    assert [len(each) for each in made] == runs
    assert len({cell.spec.name for each in made for cell in each}) == len(runs)


def cells_of(words: list[str]) -> list[Cell]:
    """What `dsgd sweep` makes of its arguments."""
    overrides = [words[at + 1] for at, word in enumerate(words) if word == "--set"]
    file, *axes = [word for word in words if word != "--set" and word not in overrides]
    return cells(grid(axes), lambda values: load(FOLDER.parent / file, [*overrides, *values]))


def test_the_model_of_ones_own_learns() -> None:
    spec = load(FOLDER / "own-model.yaml").spec
    assert spec.train.until.accuracy is not None
    model = load_model("file", path=Path(spec.train.model.path))
    data = load_data("builtin", "digits")
    rng = np.random.default_rng(spec.seed)
    params = model.init(rng, data.example(32))
    out = {name: np.empty_like(array) for name, array in params.items()}
    for _ in range(8):
        order = rng.permutation(data.examples)
        for batch in np.array_split(order, data.examples // spec.train.batch_size):
            model.gradients(params, data.x[batch], data.y[batch], out)
            for name, array in params.items():
                array -= 0.5 * out[name]
    right = model.predict(params, data.x_test).argmax(axis=1) == data.y_test
    assert right.mean() >= spec.train.until.accuracy


def test_the_gradients_of_ones_own_model_equal_central_differences() -> None:
    model = load_model("file", path=FOLDER / "own_model.py")
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((7, 3, 2)), np.arange(7) % 4
    made = model.init(rng, (x, y))
    params = {name: array + 0.1 * rng.standard_normal(array.shape) for name, array in made.items()}
    grads = {name: np.empty_like(array) for name, array in params.items()}
    model.gradients(params, x, y, grads)
    got = {name: array.copy() for name, array in grads.items()}
    h = 1e-6
    for name, array in params.items():
        for at in np.ndindex(array.shape):
            kept = array[at]
            array[at] = kept + h
            up = model.gradients(params, x, y, grads)
            array[at] = kept - h
            down = model.gradients(params, x, y, grads)
            array[at] = kept
            assert got[name][at] == pytest.approx((up - down) / (2 * h), abs=2e-9, rel=1e-6)


@pytest.mark.parametrize(("side", "parameters"), [(64, 10_805_902), (128, 40_297_102)])
def test_the_network_for_caltech_101_is_as_large_as_it_says(side: int, parameters: int) -> None:
    path = FOLDER / "caltech101.yaml"
    spec = load(path).spec
    assert spec.train.data.options["size"] == [128, 128]
    model = load_model("builtin", spec.train.model.name, spec.train.model.options)
    example = np.zeros((102, side, side, 3), np.float32), np.arange(102)
    params = model.init(np.random.default_rng(spec.seed), example)
    assert sum(array.size for array in params.values()) == parameters
    assert f"{parameters / 1e6:.1f} M" in path.read_text()
