"""The probe: the user's model and data, tried before anything else runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsgd_cli.contract.spec import Train
from tests.daemons import models
from tests.daemons.agent import Child, Message


def probe(train: dict[str, Any], tmp_path: Path) -> tuple[Message, int]:
    spec = Train.model_validate(train).model_dump(mode="json")
    files = {what: spec[what]["path"] or None for what in ("model", "data")}
    setup = {"type": "setup", "train": spec, "files": files, "seed": 0, "servers": 1}
    setup["results"] = str(tmp_path)
    child = Child("probe", setup)
    try:
        status = child.popen.wait(30)
        return child.wait_for("probed" if status == 0 else "failed", 5), status
    finally:
        child.kill()


def test_a_good_model_is_described(tmp_path: Path) -> None:
    said, status = probe({"model": "softmax"}, tmp_path)
    assert status == 0
    assert said["tensors"] == [["W1", [64, 10]], ["b1", [10]]]
    assert (said["examples"], said["dtype"]) == (1437, "float32")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (models.RAISES_ON_IMPORT, "no such luck"),
        (models.ALL_NAN, "not finite"),
        (models.WRONG_SHAPE, "W has shape (10, 64)"),
        ("def init(rng, example): return {}\n", "predict"),
    ],
)
def test_a_wrong_model_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    said, status = probe({"model": str(path)}, tmp_path)
    assert status == 1
    assert said["kind"] == "user"
    assert says in said["error"]
    assert "mine.py" in said["error"]
