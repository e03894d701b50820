"""The imports between the modules of draftcache, read from their text."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

from support.paths import ROOT

PACKAGES = ("store", "capture", "draft_train", "tools")


def module_files() -> dict[str, Path]:
    """Every module of the four folders, and the package's own, by its dotted name."""
    files = {"draftcache": ROOT / ".src" / "draftcache" / "__init__.py"}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(("draftcache", *parts)).removesuffix(".__init__")] = path
    return files


def imported_modules(code: str, known: Iterable[str]) -> set[str]:
    """The modules among `known` that this code imports, at the top, inside functions or for type checking alone."""
    known = set(known)
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in whole}
    return found & known


def import_graph() -> dict[str, set[str]]:
    """The modules that each module imports."""
    files = module_files()
    return {name: imported_modules(path.read_text(encoding="utf-8"), files) - {name} for name, path in files.items()}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another in a circle, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found
