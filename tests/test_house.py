"""House rules that no linter has: private names stay at home, and a long file says why it is one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("rmfast", "kernels", "tests", "bench", "examples")
PYTHON = [path for top in TOPS for path in sorted((ROOT / top).rglob("*.py")) if path.resolve() == path]  # links once
SUFFIXES = (".cpp", ".cu", ".cuh", ".h")  # named one by one: bytecode, x.cpython-313.pyc, has a ".c" in it, too
CPP = [path for top in ("csrc", "tests") for path in sorted((ROOT / top).rglob("*")) if path.suffix in SUFFIXES]
COMPILED = {"rmfast._C", "rmfast._C_cuda", "rmfast._planner"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return name in COMPILED or path.is_dir() or path.with_suffix(".py").exists()


def borrowed(tree: ast.AST) -> list[str]:
    """The private names that a file takes from modules of rmfast."""
    found, modules = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.asname or name.name for name in node.names if name.name.split(".")[0] == "rmfast"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rmfast":
            for name in node.names:
                if is_module(f"{node.module}.{name.name}"):
                    modules.add(name.asname or name.name)
                elif private(name.name):
                    found.append(f"line {node.lineno}: {node.module}.{name.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node.value) in modules:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("top", ["rmfast", "kernels"])
def test_private_names_are_used_in_their_own_module_alone(top):
    files = [path for path in PYTHON if path.is_relative_to(ROOT / top)]
    found = {str(path.relative_to(ROOT)): borrowed(ast.parse(path.read_text())) for path in files}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize("files, most", [(PYTHON, 500), (CPP, 600)], ids=["Python", "C++"])
def test_a_long_file_says_why_in_its_first_lines(files, most):
    """With a comment such as "Over 500 lines: one table of all errors."; else it is split by idea."""
    found = {}
    for path in files:
        lines = path.read_text().splitlines()
        if len(lines) > most and not re.search(rf"Over {most} lines: \S", "\n".join(lines[:12])):
            found[str(path.relative_to(ROOT))] = len(lines)
    assert found == {}


def test_every_package_is_in_the_wheel():
    named = set(re.findall(r'"(rmfast(?:\.\w+)*)",', (ROOT / "setup.py").read_text()))
    folders = {path.parent.relative_to(ROOT) for path in PYTHON if path.name == "__init__.py"}
    here = {".".join(folder.parts) for folder in folders if folder.parts[0] == "rmfast"}
    assert here - named == set()
