"""No import runs upwards, and what a login node runs imports no torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

FLOORS = (
    ("megatron_vl.config", "megatron_vl.run"),
    ("megatron_vl.kernels", "megatron_vl.sequence", "megatron_vl.cost"),
    ("megatron_vl.engine", "megatron_vl.data"),
    ("megatron_vl.model",),
    ("megatron_vl.train", "megatron_vl.infer"),
    ("checkpoint_tools",),
    ("launch",),
)
"""Rooms from the ground up; a room imports itself, its floor and the floors below."""

TORCH_FREE = (
    "megatron_vl.config",
    "megatron_vl.run",
    "megatron_vl.cost",
    "megatron_vl.sequence",
    "launch",
)
HEAVY = {"torch", "megatron", "transformers", "safetensors"}

SOURCES = sorted(
    path
    for package in ("megatron_vl", "checkpoint_tools", "launch")
    for path in (REPOSITORY / package).rglob("*.py")
    if path.parent.name != "hf_model"  # belongs to the exported folder, and imports its own alone
)


def floor_of(module: str) -> int | None:
    """Number of a module's floor; None outside the rooms."""
    for number, rooms in enumerate(FLOORS):
        if any(module == room or module.startswith(f"{room}.") for room in rooms):
            return number
    return None


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def imports(node: ast.AST, *, lazy: bool) -> Iterator[str]:
    """Modules a file imports.

    Args:
        lazy: also those imported inside functions.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            assert child.module is not None
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, lazy=lazy)


def imported(path: Path, *, lazy: bool) -> set[str]:
    return set(imports(ast.parse(path.read_text(encoding="utf-8")), lazy=lazy))


def test_every_module_has_a_floor() -> None:
    assert [name for name in map(name_of, SOURCES) if floor_of(name) is None] == ["megatron_vl"]


@pytest.mark.parametrize("lazy", [False, True], ids=["at the top", "inside functions"])
def test_no_import_runs_upwards(lazy: bool) -> None:
    upwards = []
    for path in SOURCES:
        here = floor_of(name_of(path))
        for module in sorted(imported(path, lazy=lazy)):
            there = floor_of(module)
            if here is not None and there is not None and there > here:
                upwards.append(f"{name_of(path)} imports {module}")
    assert not upwards


def test_a_login_node_needs_no_torch() -> None:
    heavy = [
        f"{name_of(path)} imports {module}"
        for path in SOURCES
        if name_of(path).startswith(tuple(f"{room}." for room in TORCH_FREE))
        for module in sorted(imported(path, lazy=False))
        if module.split(".")[0] in HEAVY
    ]
    assert not heavy


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "one.py"
    file.write_text("def f():\n    from megatron_vl.train import main\n")
    assert imported(file, lazy=False) == set()
    assert imported(file, lazy=True) == {"megatron_vl.train", "megatron_vl.train.main"}
    assert floor_of("megatron_vl.train.main") == 4
