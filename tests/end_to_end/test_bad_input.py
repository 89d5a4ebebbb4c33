"""Bad input: the message, the exit code, in time, and nothing left."""

from __future__ import annotations

import textwrap

import pytest

from tests.end_to_end.conftest import User

CLUSTER = """
name: NAME
servers: SERVERS
workers: 2
train:
  model: model.py
  data: data.py
  until: {accuracy: 0.9, max_epochs: 3}
"""
MODEL = """
import numpy as np

def init(rng, example):
    x, y = example
    return {"W": 0.01 * rng.standard_normal((x.shape[1], 3)), "b": np.zeros(3)}

def predict(params, x):
    return x @ params["W"] + params["b"]

def gradients(params, x, y):
    z = predict(params, x)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    p[np.arange(len(y)), y] -= 1
    return GRADIENTS
"""
GRADIENTS = 'loss, {"W": x.T @ p / len(y), "b": p.mean(axis=0)}'
DATA = """
import numpy as np

def load():
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 600)
    x = rng.standard_normal((600, 5)) * 0.1
    x[np.arange(600), y] += 1
    return x[:N], y[:N], x[500:], y[500:]
"""


def write(
    user: User,
    *,
    model: str = MODEL,
    gradients: str = GRADIENTS,
    examples: int = 500,
    servers: int = 1,
) -> None:
    user.write(CLUSTER.replace("SERVERS", str(servers)))
    user.write(model.replace("GRADIENTS", gradients), "model.py")
    user.write(DATA.replace("N", str(examples)), "data.py")


def test_a_model_of_ones_own_trains(user: User) -> None:
    write(user)
    run = user.dsgd("train", "cluster.yaml", "--json")
    assert run.code == 0, run.err
    assert run.summary["value"] >= 0.9
    user.assert_nothing_left()


def test_a_model_of_ones_own_from_a_module(user: User) -> None:
    write(user)
    (user.folder / "lab").mkdir()
    (user.folder / "lab" / "__init__.py").write_text("")
    (user.folder / "model.py").rename(user.folder / "lab" / "net.py")
    run = user.dsgd("train", "cluster.yaml", "--json", "--set", "train.model=lab.net")
    assert run.code == 0, run.err


@pytest.mark.parametrize(
    ("gradients", "words"),
    [
        ('loss, {"W": p, "b": p.mean(axis=0)}', ["gradients", "W", "(5, 3)"]),
        ('loss, {"W": x.T @ p}', ["gradients", "b"]),
        (
            'loss, {"W": (x.T @ p).astype(complex), "b": p.mean(axis=0)}',
            ["gradients", "W", "complex"],
        ),
        ('loss, {"W": x.T @ p * np.nan, "b": p.mean(axis=0)}', ["gradients", "W", "nan"]),
        ("loss", ["gradients", "(loss, "]),
        ("1 / 0", ["ZeroDivisionError", "model.py"]),
    ],
)
def test_a_wrong_gradient_is_said_before_any_server_starts(
    user: User, gradients: str, words: list[str]
) -> None:
    write(user, gradients=gradients)
    run = user.dsgd("train", "cluster.yaml", timeout_s=20)
    assert run.code == 6, run.err
    for word in words:
        assert word.lower() in run.err.lower()
    assert "restart" not in run.err
    user.assert_nothing_left()


def test_a_model_that_raises_on_import_ends_with_its_traceback(user: User) -> None:
    write(user, model="import numpy\nraise RuntimeError('no such weights')\n")
    run = user.dsgd("train", "cluster.yaml", timeout_s=20)
    assert run.code == 6
    last = [line for line in run.err.splitlines() if line.strip()][-6:]
    assert any("model.py" in line and "line 2" in line for line in last), run.err
    assert "RuntimeError: no such weights" in last[-1]
    user.assert_nothing_left()


def test_gradients_that_become_nan_later_end_diverged(user: User) -> None:
    turns = textwrap.dedent(
        """
        calls = 0
        def spoil(gradients):
            global calls
            calls += 1
            return {k: v * np.nan if calls > 20 else v for k, v in gradients.items()}
        """
    )
    gradients = 'loss, spoil({"W": x.T @ p / len(y), "b": p.mean(axis=0)})'
    write(user, model=MODEL + turns, gradients=gradients)
    run = user.dsgd(
        *("train", "cluster.yaml", "--json", "--set", "train.until={accuracy: 1.0, loss: 0.0}")
    )
    assert (run.code, run.summary["outcome"]) == (7, "diverged"), run.err
    assert "W" in run.err
    user.assert_nothing_left()
    from numpy import isfinite
    from safetensors.numpy import load_file

    params = load_file(user.folder / run.summary["run_dir"] / "model.safetensors")
    assert all(isfinite(array).all() for array in params.values())


def test_an_empty_data_set_is_refused(user: User) -> None:
    write(user, examples=0)
    run = user.dsgd("train", "cluster.yaml", timeout_s=20)
    assert run.code == 6
    assert "empty" in run.err or "no examples" in run.err
    user.assert_nothing_left()


def test_more_servers_than_blocks_is_refused_with_a_number_that_works(user: User) -> None:
    write(user, servers=4)
    run = user.dsgd("train", "cluster.yaml", timeout_s=20)
    assert run.code == 3, run.err
    assert "4 servers" in run.err
    user.assert_nothing_left()


def test_a_missing_model_file_is_a_mistake_in_the_yaml(user: User) -> None:
    write(user)
    (user.folder / "model.py").unlink()
    run = user.dsgd("train", "cluster.yaml")
    assert run.code == 3
    assert "cluster.yaml:6:" in run.err
    assert "model.py" in run.err


@pytest.mark.parametrize(
    "override",
    [
        "name=$(touch canary)",
        "name=-rf",
        "name=../x",
        "name='a b'",
        'name="a\\nb"',
        "hosts=['; touch canary']",
        "hosts=[$(touch canary)]",
        "hosts=[-oProxyCommand=touch canary]",
        "ssh.python='python3; touch canary'",
        "ssh.user='$(touch canary)'",
        "train.model='$(touch canary).py'",
    ],
)
def test_hostile_values_are_refused_and_run_nothing(user: User, override: str) -> None:
    write(user)
    run = user.dsgd("check", "cluster.yaml", "--set", override)
    assert run.code == 3, (run.out, run.err)
    run = user.dsgd("train", "cluster.yaml", "--set", override, timeout_s=20)
    assert run.code == 3
    assert not (user.folder / "canary").exists()


def test_hostile_environment_values_and_paths_arrive_as_they_are(user: User) -> None:
    hostile = "$(touch canary) `touch canary` '; touch canary #\\\" -rf ../x"
    write(user)
    weird = user.folder / "it's $(touch canary)"
    weird.mkdir()
    check = f"import os\nassert os.environ['EVIL'] == {hostile!r}, os.environ['EVIL']\n"
    (weird / "model.py").write_text(check + MODEL.replace("GRADIENTS", GRADIENTS))
    import json

    run = user.dsgd(
        *("train", "cluster.yaml", "--json"),
        *("--set", f"workers.env={json.dumps({'EVIL': hostile})}"),
        *("--set", f"train.model={json.dumps(str(weird / 'model.py'))}"),
    )
    assert run.code == 0, run.err
    assert not list(user.folder.rglob("canary"))
    user.assert_nothing_left()


def test_requirements_that_this_machine_lacks_are_named_and_nothing_starts(user: User) -> None:
    user.write("numpy\nno-such-lib==1.0\n", "requirements.txt")
    user.write("name: NAME\nenv: {requirements: requirements.txt}\n")
    run = user.dsgd("train", "cluster.yaml")
    assert run.code == 4
    assert "does not have: no-such-lib" in run.err
    assert "-m pip install -r" in run.err
    user.write("name: NAME\nenv: {requirements: gone.txt}\n")
    run = user.dsgd("train", "cluster.yaml")
    assert run.code == 3
    assert "cluster.yaml:2:21" in run.err and "gone.txt': no such file" in run.err
    user.assert_nothing_left()


def test_a_model_that_ends_its_process_is_said_at_once(user: User) -> None:
    write(
        user, model=MODEL.replace("    z = predict", "    import os; os._exit(0)\n    z = predict")
    )
    run = user.dsgd("train", "cluster.yaml")
    assert run.code == 6 and "failed: exit status 0" in run.err
    user.assert_nothing_left()


def test_a_model_may_close_what_it_could_print_to(user: User) -> None:
    write(user, model="import sys\nsys.stdout = None\nsys.stderr.close()\n" + MODEL)
    run = user.dsgd("train", "cluster.yaml")
    assert run.code == 0, run.err
    write(user, model="import sys\nsys.stdout = None\nsys.stderr.close()\n1 / 0\n" + MODEL)
    run = user.dsgd("train", "cluster.yaml")
    assert run.code == 6 and "ZeroDivisionError" in run.err
    user.assert_nothing_left()
