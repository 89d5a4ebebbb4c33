"""User code: how it is found, called and blamed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsgd_cli.learning
from dsgd_cli.contract.errors import SpecError, UserCodeError
from dsgd_cli.learning.adapters import Model, load_data, load_model
from dsgd_cli.learning.checks import check_gradients, check_initial
from dsgd_cli.learning.models import Functions

Array = np.ndarray[Any, Any]

LINEAR = """
import numpy as np

def init(rng, example):
    x, y = example
    return {"W": rng.standard_normal((x.shape[1], 2)), "b": np.zeros(2)}

def predict(params, x):
    return x @ params["W"] + params["b"]

def gradients(params, x, y):
    error = predict(params, x) - np.eye(2)[y]
    return (error**2).mean(), {"W": x.T @ error / len(x), "b": error.mean(axis=0)}
"""
X = np.arange(12.0).reshape(4, 3)
Y = np.array([0, 1, 1, 0])


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def model_of(tmp_path: Path, text: str) -> Model:
    return load_model("file", path=write(tmp_path / "model.py", text))


def buffers(params: dict[str, Array], dtype: str = "float32") -> dict[str, Array]:
    return {name: np.full(array.shape, np.nan, dtype) for name, array in params.items()}


# ---- finding it


def test_a_model_file_is_plain_functions(tmp_path: Path) -> None:
    model = model_of(tmp_path, LINEAR)
    assert (model.name, model.takes_out, model.has_metrics) == ("model.py", False, False)
    params = model.init(np.random.default_rng(0), (X, Y))
    assert {name: a.shape for name, a in params.items()} == {"W": (3, 2), "b": (2,)}
    out = buffers(params)
    loss = model.gradients(params, X, Y, out)
    assert type(loss) is float
    error = model.predict(params, X) - np.eye(2)[Y]
    np.testing.assert_allclose(out["W"], X.T @ error / 4, rtol=1e-6)


def test_builtins_take_options_by_keyword() -> None:
    params = load_model("builtin", "mlp", {"hidden": [7]}).init(np.random.default_rng(0), (X, Y))
    assert params["W1"].shape == (3, 7)
    with pytest.raises(SpecError, match="no model 'rnn'"):
        load_model("builtin", "rnn")
    with pytest.raises(SpecError, match="model mlp: got an unexpected keyword argument 'depth'"):
        load_model("builtin", "mlp", {"depth": 3})
    with pytest.raises(SpecError, match="'pickle' is not a kind"):
        load_data("pickle")


def test_an_importable_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mylab").mkdir()
    write(tmp_path / "mylab" / "linear.py", LINEAR)
    write(tmp_path / "mylab" / "broken.py", "import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_model("module", "mylab.linear").name == "mylab.linear"
    with pytest.raises(UserCodeError, match=r"mylab\.other: there is no such module on this host"):
        load_model("module", "mylab.other")
    with pytest.raises(UserCodeError, match="nolab") as caught:
        load_model("module", "nolab.linear")
    assert "env: existing" in caught.value.remedy
    with pytest.raises(UserCodeError, match=r"mylab\.broken: import failed: ModuleNotFoundError"):
        load_model("module", "mylab.broken")


def test_siblings_can_be_imported_now_and_later(tmp_path: Path) -> None:
    write(tmp_path / "sibling_one.py", "CLASSES = 2")
    write(tmp_path / "sibling_two.py", "VALUE = 7.0")
    write(tmp_path / "json.py", "raise RuntimeError('hides the real one')")
    text = LINEAR.replace("import numpy as np", "import numpy as np\nimport sibling_one")
    text = text.replace("x, y = example", "x, y = example\n    import sibling_two, json")
    before = list(sys.path)
    model = model_of(tmp_path, text)
    model.init(np.random.default_rng(0), (X, Y))
    assert sys.modules["sibling_two"].VALUE == 7
    assert sys.path == [*before, str(tmp_path)]
    assert not (tmp_path / "__pycache__").exists()  # nothing is left next to the user's file
    assert sys.dont_write_bytecode is False or "PYTHONDONTWRITEBYTECODE" in __import__("os").environ


def test_a_file_is_imported_once_and_may_hold_model_and_data(tmp_path: Path) -> None:
    count = tmp_path / "count"
    text = f"with open({str(count)!r}, 'a') as file:\n    file.write('x')\n{LINEAR}\n"
    text += "def load():\n    x = np.ones((4, 3)); y = [0, 1, 1, 0]\n    return x, y, x, y\n"
    path = write(tmp_path / "both.py", text)
    load_model("file", path=path)
    data = load_data("file", path=path)
    assert data.name == "both.py" and data.y.tolist() == [0, 1, 1, 0]
    assert count.read_text() == "x"


def test_a_dataclass_in_a_user_file_works(tmp_path: Path) -> None:
    head = "from __future__ import annotations\nimport dataclasses\n"
    head += "@dataclasses.dataclass\nclass Options:\n    width: int = 2\n"
    model_of(tmp_path, head + LINEAR)


# ---- blaming it


@pytest.mark.parametrize(
    ("text", "message", "lines"),
    [
        (
            "import os\nraise ValueError('no\\nway')",
            "import failed: ValueError: no way",
            ["line 2, in <module>"],
        ),
        ("x = (1,\ny = 2", "import failed: SyntaxError", ["line 1", "x = (1,", "^"]),
        ("import sys\nsys.exit(3)", "import failed: SystemExit: 3", ["sys.exit(3)"]),
        ("import no_such_lib", "import failed: ModuleNotFoundError", ["import no_such_lib"]),
        ("def f():\n    return 1 / 0\nf()", "ZeroDivisionError", ["line 3", "in f", "1 / 0"]),
    ],
)
def test_a_file_that_fails_on_import(
    tmp_path: Path, text: str, message: str, lines: list[str]
) -> None:
    path = write(tmp_path / "model.py", text)
    before = set(sys.modules)
    for load in (load_model, load_data):
        with pytest.raises(UserCodeError) as caught:
            load("file", path=path)
        assert str(caught.value).startswith("model.py: import failed: ")
        assert message in str(caught.value) and "\n" not in str(caught.value)
        shown = "\n".join(caught.value.details)
        for line in lines:
            assert line in shown
        assert "importlib" not in shown and "adapters.py" not in shown
        assert str(path) in shown
        assert caught.value.exit_code == 6
    assert not [name for name in set(sys.modules) - before if name.startswith("dsgd_user")]


def test_the_failing_sibling_is_in_the_traceback(tmp_path: Path) -> None:
    write(tmp_path / "sibling_bad.py", "import math\nmath.sqrt(-1)")
    with pytest.raises(UserCodeError) as caught:
        model_of(tmp_path, "import sibling_bad")
    shown = "\n".join(caught.value.details)
    assert "import sibling_bad" in shown and "math.sqrt(-1)" in shown and "<frozen" not in shown


def test_a_missing_library_has_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError) as caught:
        model_of(tmp_path, "import no_such_lib")
    assert "install no_such_lib on the hosts" in caught.value.remedy


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match=r"gone\.py: there is no Python file at"):
        load_model("file", path=tmp_path / "gone.py")


@pytest.mark.parametrize(
    ("old", "new", "message", "remedy"),
    [
        ("def init", "def initial", "no function init(rng, example)", "is initial meant to be it?"),
        ("def predict", "def run", "no function predict(params, x)", "define predict(params, x)"),
        ("def gradients", "def gradient", "no function gradients(params, x, y)", "is gradient"),
        (
            "def init(rng, example):",
            "def init(rng):",
            "init is called as init(rng, example)",
            "(rng)",
        ),
        (
            "def gradients(params, x, y)",
            "def gradients(params, x, y, z)",
            "'z'",
            "(params, x, y, z)",
        ),
        (
            "def predict(params, x)",
            "predict = 3\ndef f(params, x)",
            "no function predict",
            "define",
        ),
    ],
)
def test_functions_that_are_not_there(
    tmp_path: Path, old: str, new: str, message: str, remedy: str
) -> None:
    with pytest.raises(UserCodeError) as caught:
        model_of(tmp_path, LINEAR.replace(old, new))
    assert message in str(caught.value) and str(caught.value).startswith("model.py: ")
    assert remedy in caught.value.remedy


def test_metrics_with_the_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="metrics is called as"):
        model_of(tmp_path, LINEAR + "def metrics(params): ...\n")


def test_more_arguments_with_defaults_are_fine(tmp_path: Path) -> None:
    more = LINEAR.replace("params, x, y):", "params, x, y, scale=1.0, **more):")
    assert model_of(tmp_path, more).takes_out is False


@pytest.mark.parametrize("function", ["init", "predict", "gradients", "metrics"])
def test_what_a_function_raises_names_it_and_its_line(tmp_path: Path, function: str) -> None:
    text = LINEAR + "def metrics(params, x, y):\n    return {}\n"
    call = f"def {function}("
    body = text.index("\n", text.index(call)) + 1
    model = model_of(
        tmp_path, text[:body] + "    helper()\n" + text[body:] + "def helper():\n    [][1]\n"
    )
    params = {"W": np.zeros((3, 2)), "b": np.zeros(2)}
    calls = {
        "init": lambda: model.init(np.random.default_rng(0), (X, Y)),
        "predict": lambda: model.predict(params, X),
        "gradients": lambda: model.gradients(params, X, Y, buffers(params)),
        "metrics": lambda: model.metrics(params, X, Y),
    }
    with pytest.raises(UserCodeError) as caught:
        calls[function]()
    assert str(caught.value) == (f"model.py: {function} raised IndexError: list index out of range")
    frames = [line for line in caught.value.details if line.startswith("  File")]
    assert [frame.rsplit(" ", 1)[1] for frame in frames] == [function, "helper"]


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("asyncio.CancelledError()", "raised CancelledError"),
        ("type('Own', (BaseException,), {})('end')", "raised Own: end"),
        ("ValueError('z' * 10**7)", "raised ValueError: zzz"),
        ("ValueError('z\\n' * 10**5)", "raised ValueError: z z"),
        ("OSError('no file ' + chr(0xDCFF))", "no file .udcff"),
        ("type('Own', (Exception,), {'__str__': lambda self: 1 / 0})()", "its text cannot be had"),
    ],
)
def test_whatever_is_raised_becomes_a_message_that_can_be_sent(
    tmp_path: Path, raised: str, message: str
) -> None:
    text = "import asyncio\n" + LINEAR.replace(
        "def predict(params, x):\n", f"def predict(params, x):\n    raise {raised}\n"
    )
    model = model_of(tmp_path, text)
    with pytest.raises(UserCodeError, match=message) as caught:
        model.predict({"W": np.zeros((3, 2)), "b": np.zeros(2)}, X)
    said = "\n".join([caught.value.message, *caught.value.details])
    assert "in predict" in said and len(said.encode()) < 10_000


# ---- what comes back


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "init must return a dict of arrays, it returned None"),
        ([np.zeros(2)], "it returned a list"),
        ({}, "init returned no arrays"),
        ({"W": np.zeros((0, 3))}, "only empty arrays"),
        ({1: np.zeros(2)}, "init: 1 cannot be the name of an array"),
        ({"__metadata__": np.zeros(2)}, "cannot be the name"),
        ({"a\nb": np.zeros(2)}, "cannot be the name"),
        ({"W": np.zeros(2, int)}, "init: W has dtype int64, it must be float"),
        ({"W": np.zeros(2, complex)}, "init: W has dtype complex128, it must be float"),
        ({"W": [1.0, None]}, "init: W has dtype object, it must be float"),
        ({"W": [[1.0], [1.0, 2.0]]}, "init: W is not an array"),
        (
            {"W": [[0.0, 1.0], [np.nan, np.inf]]},
            r"init: W\[1, 0\] is nan \(2 of 4 are not finite\)",
        ),
        ({"W": np.inf}, r"init: W is inf \(1 of 1"),
    ],
)
def test_initial_parameters_that_cannot_be_used(made: object, message: str) -> None:
    with pytest.raises(UserCodeError, match=message):
        check_initial(made)
    model = Model("m", Functions(lambda rng, example: made, len, len), False)
    with pytest.raises(UserCodeError, match=f"m: .*{message}"):
        model.init(np.random.default_rng(0), (X, Y))


def test_lists_and_scalars_are_arrays_too() -> None:
    made = check_initial({"W": [[1.0, 2.0]], "s": 3.0, "none": np.zeros((0, 2))})
    assert {name: array.shape for name, array in made.items()} == {
        "W": (1, 2),
        "s": (),
        "none": (0, 2),
    }


PARAMS = {"W1": np.zeros((64, 10)), "b": np.zeros(10)}
GOOD = {"W1": np.ones((64, 10)), "b": np.ones(10)}
SHAPES = [
    (
        (1.0, GOOD | {"W1": np.ones((10, 64))}),
        r"gradients: W1 has shape \(10, 64\), init made \(64, 10\)",
    ),
    ((1.0, GOOD | {"b": np.ones(1)}), r"b has shape \(1,\), init made \(10,\)"),  # would broadcast
    ((1.0, {"W1": GOOD["W1"]}), "gradients: no b; init made W1, b"),
    ((1.0, GOOD | {"b3": np.ones(1)}), "gradients: b3 not made by init"),
    ((1.0, GOOD | {"b": np.ones(10, complex)}), "b has dtype complex128, it must be float"),
    ((1.0, GOOD | {"b": np.ones(10, int)}), "b has dtype int64, it must be float"),
    ((1.0, GOOD | {"b": np.array([None] * 10)}), "b has dtype object"),
    ((1.0, None), r"must return \(loss, dict of arrays\), the second is None"),
    ((np.ones(3), GOOD), r"the loss must be a number, it is an array of shape \(3,\)"),
    (("low", GOOD), "the loss must be a number, it is a str"),
    ((None, GOOD), "the loss must be a number, it is None"),
    ((1j, GOOD), "the loss must be a number, it is a complex"),
]


@pytest.mark.parametrize(("result", "message"), SHAPES)
@pytest.mark.parametrize("takes_out", [False, True])
def test_gradients_that_cannot_be_used(result: Any, message: str, takes_out: bool) -> None:
    with pytest.raises(UserCodeError, match=message):
        check_gradients(PARAMS, *result)
    model = Model("m", Functions(len, len, lambda *a, out=None: result), takes_out)
    with pytest.raises(UserCodeError, match=message):
        model.gradients(PARAMS, X, Y, buffers(PARAMS))


@pytest.mark.parametrize("result", [None, 1.0, GOOD, (1.0, GOOD, 3), [1.0, GOOD]])
def test_gradients_that_return_something_else(result: Any) -> None:
    model = Model("m", Functions(len, len, lambda *_: result), False)
    with pytest.raises(UserCodeError, match=r"m: gradients must return \(loss, dict of arrays\)"):
        model.gradients(PARAMS, X, Y, buffers(PARAMS))


@pytest.mark.parametrize(
    ("loss", "grads", "message"),
    [
        (np.nan, GOOD, "gradients: the loss is nan"),
        (1.0, GOOD | {"b": np.full(10, np.inf)}, r"gradients: b\[0\] is inf \(10 of 10"),
    ],
)
def test_what_is_not_finite_is_for_the_probe_to_refuse(
    loss: float, grads: dict[str, Array], message: str
) -> None:
    with pytest.raises(UserCodeError, match=message):
        check_gradients(PARAMS, loss, grads)
    model = Model("m", Functions(len, len, lambda *_: (loss, grads)), False)
    out = buffers(PARAMS)
    np.testing.assert_equal(model.gradients(PARAMS, X, Y, out), loss)  # while training: a value
    np.testing.assert_array_equal(out["b"], grads["b"])


@pytest.mark.parametrize("loss", [2.5, np.float32(2.5), np.array(2.5), np.array([2.5])])
def test_gradients_are_cast_to_the_dtype_of_the_run(loss: Any) -> None:
    model = Model("m", Functions(len, len, lambda *_: (loss, GOOD)), False)
    out = buffers(PARAMS)
    got = model.gradients(PARAMS, X, Y, out)
    assert got == 2.5 and type(got) is float
    assert out["W1"].dtype == np.float32 and (out["W1"] == 1).all()


def test_a_gradient_too_large_for_float32_becomes_infinite_without_a_warning() -> None:
    model = Model(
        "m", Functions(len, len, lambda *_: (1.0, GOOD | {"b": np.full(10, 1e99)})), False
    )
    out = buffers(PARAMS)
    model.gradients(PARAMS, X, Y, out)
    assert np.isinf(out["b"]).all()


def test_with_out_nothing_is_copied(tmp_path: Path) -> None:
    head, _ = LINEAR.split("def gradients")
    model = model_of(
        tmp_path,
        f"""{head}
def gradients(params, x, y, out):
    seen.append(out)
    out["W"][...] = 4
    out["b"][...] = 5
    return 1.0, out
seen = []
""",
    )
    assert model.takes_out
    params = model.init(np.random.default_rng(0), (X, Y))
    out = buffers(params)
    model.gradients(params, X, Y, out)
    assert sys.modules[model.functions.gradients.__module__].seen[0] is out
    assert (out["b"] == 5).all() and (out["W"] == 4).all()


def test_out_may_be_ignored_in_part() -> None:
    def gradients(params: Any, x: Array, y: Array, out: dict[str, Array]) -> Any:
        out["W1"][...] = 2
        return 1.0, {"W1": out["W1"], "b": np.full(10, 3.0)}

    out = buffers(PARAMS)
    Model("m", Functions(len, len, gradients), True).gradients(PARAMS, X, Y, out)
    assert (out["W1"] == 2).all() and (out["b"] == 3).all()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (0.5, "must return a dict of numbers"),
        ({"f1": "high"}, "'f1' is 'high', not a number"),
        ({"f1": [0.1, 0.2]}, "not a number"),
        ({1: 0.1}, "1 cannot be the name of a metric"),
        ({"": 0.1}, "'' cannot be the name of a metric"),
        ({"\udcff": 0.1}, "cannot be the name of a metric"),
        ({"long" * 10**6: 0.1}, "cannot be the name of a metric"),
        ({"f1": list(range(10**6))}, "'f1' is .{100}, not a number"),
    ],
)
def test_metrics_that_cannot_be_used(found: Any, message: str) -> None:
    model = Model("m", Functions(len, len, len, lambda *_: found), False)
    with pytest.raises(UserCodeError, match=f"m: metrics.*{message}"):
        model.metrics(PARAMS, X, Y)


# ---- data


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1, 2", "load must return x, y, x_test, y_test; it returned 2 values"),
        ("return None", "it returned NoneType"),
        ("return [[1], [1, 2]], 2, 3, 4", "data.py: x is not an array"),
        ("return [], [], [], []", "data.py: x has no examples"),
        ("return ['a'], [1], ['b'], [1]", "x has dtype <U1, it must hold numbers"),
        ("raise OSError('no disk')", "data.py: load raised OSError: no disk"),
    ],
)
def test_data_files_that_cannot_be_used(tmp_path: Path, body: str, message: str) -> None:
    path = write(tmp_path / "data.py", f"def load():\n    {body}\n")
    with pytest.raises(UserCodeError) as caught:
        load_data("file", path=path)
    assert message in str(caught.value)


def test_a_data_file_without_load(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match=r"there is no function load\(\)"):
        load_data("file", path=write(tmp_path / "data.py", "def loads(): ..."))


# ---- torch


def test_a_host_without_torch_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "dsgd_cli.learning.torch_adapter", raising=False)
    monkeypatch.delattr(dsgd_cli.learning, "torch_adapter", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    path = write(tmp_path / "net.py", "from torch import nn\n")
    with pytest.raises(UserCodeError, match="torch is not installed") as refusal:
        load_model("torch", "Net", path=path)
    assert "pip install torch" in refusal.value.remedy
    assert "env: existing" in refusal.value.remedy


def test_models_without_torch_do_not_import_it() -> None:
    code = (
        "import sys\n"
        "from dsgd_cli.learning.adapters import load_model\n"
        "load_model('builtin', 'cnn')\n"
        "print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
