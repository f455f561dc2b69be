"""Reads the source of megatron-core for literals that name the device "cuda"."""

import ast
import sys
from pathlib import Path

from tests.train.jobs import train_from_scratch


def modules_of_a_step(file: Path, overrides: list[str]) -> dict[str, str]:
    """Train one step; the modules of megatron-core that are imported then, with their files."""
    train_from_scratch(file, overrides, 1)
    return {
        name: module.__file__
        for name, module in sorted(sys.modules.items())
        if name.startswith("megatron.core") and getattr(module, "__file__", None)
    }


def literals(file: Path) -> list[tuple[int, ast.AST]]:
    """Every "cuda" or "cuda:N" in a module: its line, and the expression around it, which is the
    call where it is a keyword of one."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and str(node.value).split(":")[0] == "cuda":
            parent = parents[node]
            around = parents[parent] if isinstance(parent, ast.keyword) else parent
            found.append((node.lineno, around))
    return found
