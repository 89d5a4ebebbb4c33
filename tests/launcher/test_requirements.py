"""What of a requirements file is missing on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from dsgd_cli.contract.errors import HostUnfit
from dsgd_cli.launcher import requirements


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("# nothing\n\n   # at all\n", []),
        ("torch\npandas==2.0  # tables\n", ["torch", "pandas"]),
        ("a>=1,<2\nb ~= 1.0\nc[x,y]>1\nd @ https://d.example/d.whl\n", ["a", "b", "c", "d"]),
        ("--index-url https://x.example\n-r other.txt\n-e .\n./local\n", []),
        ("here; sys_platform == 'win32'\nthere\n", ["there"]),
        ("torch==2.0 \\\n    --hash=sha256:00\nnext\n", ["torch", "next"]),
    ],
)
def test_the_names_of_a_requirements_file(text: str, names: list[str]) -> None:
    assert list(requirements.named(text)) == names


def test_what_is_missing_here_is_named(tmp_path: Path) -> None:
    listed = tmp_path / "requirements.txt"
    listed.write_text("numpy\nPyYAML\ntyping_extensions>=1\n")
    requirements.check("local", listed)
    listed.write_text("numpy\nno-such-lib\nno_other==2\n")
    with pytest.raises(HostUnfit, match=r"does not have: no-such-lib, no_other$") as failure:
        requirements.check("local", listed)
    assert failure.value.remedy == f"{sys.executable} -m pip install -r {listed}"
