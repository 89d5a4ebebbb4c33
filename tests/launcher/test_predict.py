"""What `--data` means for a run: as the run's own data, but for the path."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsgd_cli.contract.references import DataRef
from dsgd_cli.launcher.load import load
from dsgd_cli.launcher.predict import _override


@pytest.mark.parametrize(
    ("own", "given", "kind", "options"),
    [
        ("{csv: 'host:/a.csv', label: y, per_host: true}", "b.csv", "csv", {"label": "y"}),
        ("{images: photos, size: [8, 9]}", "new", "images", {"size": [8, 9], "grey": False}),
        ("{idx: photos}", "new", "idx", {"test_fraction": 0.2}),
        ("{svmlight: a.svm, features: 7}", "b.libsvm", "svmlight", {"features": 7}),
        ("{csv: a.csv, label: kind}", "b.csv", "csv", {"label": "kind", "delimiter": ","}),
        ("{csv: a.csv, label: kind}", "b.npz", "npz", {"test_fraction": 0.2}),
        ("{csv: a.csv, label: kind}", "{csv: b.csv}", "csv", {"label": -1}),
        ("digits", "b.csv", "csv", {"label": -1}),
    ],
)
def test_what_is_of_the_runs_kind_is_read_as_its_own(
    own: str,
    given: str,
    kind: str,
    options: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("new").mkdir()
    for name in ("a.svm", "b.libsvm", "a.csv", "b.csv", "b.npz"):
        Path(name).touch()
    Path("cluster.yaml").write_text(f"train: {{data: {own}}}\n")
    data: DataRef = load("cluster.yaml", [_override(Path("cluster.yaml"), given)]).spec.train.data
    assert data.kind == kind
    assert options.items() <= data.options.items()
