"""Imports go one way, and each half stays light."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dsgd_cli"

# folder -> the folders of dsgd_cli that it may import
ALLOWED = {
    "contract": set(),
    "agent": set(),
    "transport": {"contract"},
    "engine": {"contract"},
    "learning": {"contract"},
    "wire": {"contract"},
    "daemons": {"contract", "engine", "learning", "wire"},
    "reporting": {"contract"},
    "launcher": {"contract", "transport", "agent", "reporting"},
}
FORBIDDEN = {
    "agent": {"numpy", "grpc", "google", "click", "rich", "yaml", "paramiko", "pydantic"},
    "launcher": {"numpy", "grpc", "google", "click"},
    "reporting": {"numpy", "grpc", "google", "click", "rich", "paramiko", "pydantic"},
    "transport": {"numpy", "grpc", "google", "click", "rich", "yaml", "pydantic"},
    "contract": {"numpy", "grpc", "google", "click", "rich", "yaml", "paramiko"},
    "engine": {"grpc", "google", "click", "rich", "yaml", "paramiko"},
    "learning": {"grpc", "google", "click", "rich", "yaml", "paramiko"},
    "wire": {"click", "rich", "yaml", "paramiko"},
    "daemons": {"click", "rich", "yaml", "paramiko"},
}


def imported(path: Path, *, types_too: bool = True) -> set[str]:
    """Absolute names of all modules that a file imports, at any depth."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    if not types_too:
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    files = list((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "dsgd_cli" and len(parts) > 1 and (PACKAGE / parts[1]).is_dir():
                assert parts[1] in ALLOWED[folder] | {folder}, f"{path} imports {name}"
            assert parts[0] not in FORBIDDEN[folder], f"{path} imports {name}"


def test_paramiko_is_imported_in_one_folder() -> None:
    users = {
        str(path.parent.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if "paramiko" in {name.split(".")[0] for name in imported(path)}
    }
    assert users == {"transport/ssh"}


def test_matplotlib_is_imported_in_one_file_and_only_when_something_is_drawn() -> None:
    users = {
        path.relative_to(PACKAGE).as_posix(): path
        for path in PACKAGE.rglob("*.py")
        if "matplotlib" in {name.split(".")[0] for name in imported(path)}
    }
    assert set(users) == {"reporting/png.py"}
    at_import = ast.parse(users["reporting/png.py"].read_text()).body
    assert "matplotlib" not in {
        name.split(".")[0]
        for node in at_import
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [])
        if name
    }


def test_no_module_imports_itself_by_a_detour() -> None:
    names = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    graph = {name: imported(path, types_too=False) & set(names) for name, path in names.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names them


def test_no_pickle_anywhere() -> None:
    for path in PACKAGE.rglob("*.py"):
        bad = {n.split(".")[0] for n in imported(path)} & {"pickle", "marshal", "shelve", "dill"}
        assert not bad, f"{path} imports {bad}"


def test_help_loads_neither_half() -> None:
    code = (
        "import sys\n"
        "from dsgd_cli import cli\n"
        "heavy = {'numpy', 'grpc', 'pydantic', 'yaml', 'paramiko', 'rich', 'cryptography'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
