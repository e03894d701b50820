"""The house rules that a machine can hold: import direction, light start-up, honest exports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from draftcache.store.common import errors
from draftcache.tools.cli import COMMANDS
from support.imports import circles, import_graph, imported_modules, module_files
from support.log_lines import without_times
from support.paths import ROOT

ROOMS = {
    "store": {"common": 0, "storage": 1, "format": 2, "layouts": 3, "": 4},
    "capture": {"kernels": 0, "prepare": 1, "verifier": 1, "generate": 2, "job": 2, "peers": 3, "engine": 4, "": 5},
    "draft_train": {"setting_tables": 0, "config": 1, "kernels": 1, "data": 2, "loss": 3, "drafts": 4, "": 5},
    "tools": {
        "arguments": 0,
        "decoding": 0,
        "students_t": 0,
        "truth": 1,
        "running_engine": 0,
        "engine_count": 1,
        "results": 0,
        "config_file": 1,
        "reports": 1,
        "probe": 1,
        "cli": 2,
        "recipes": 3,
        "sweep": 3,
        "demo": 4,
        "commands": 5,
        "bench": 6,
        "engine_check": 5,
        "result_rows": 0,
        "campaign": 6,
    },
}
"""Per package the rank of its rooms, which are folders or single modules; "" stands for the other modules at its top. A
module imports from its own room and from rooms of lower rank."""
PACKAGES_BELOW = {
    "store": set(),
    "capture": {"store"},
    "draft_train": {"store"},
    "tools": {"store", "capture", "draft_train"},
}
NEED_TORCH = {
    f"draftcache.store.{name}"
    for name in ("common.device", "common.pinned_ring", "common.products", "format.torch_codecs")
}
"""Modules of the store that work on tensors: whoever imports them has torch already."""
MOST_LINES = 300


def loaded_by(code: str) -> set[str]:
    command = f"{code}; import sys; print(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def import_all(names: Iterable[str]) -> str:
    return "; ".join(f"import {name}" for name in sorted(names))


def modules_of(package: str) -> set[str]:
    return {name for name in module_files() if name.startswith(f"draftcache.{package}.")}


def test_draft_train_loads_no_verifier() -> None:
    modules = loaded_by(import_all(modules_of("draft_train")))
    assert "torch" in modules
    assert not {name for name in modules if name.startswith(("transformers", "mamba_ssm", "draftcache.capture"))}


def test_store_needs_neither_torch_nor_transformers() -> None:
    modules = loaded_by(import_all(modules_of("store") - NEED_TORCH))
    assert not {
        name
        for name in modules
        if name.startswith(("torch", "transformers", "draftcache.capture", "draftcache.draft_train"))
    }
    for name in NEED_TORCH:
        assert "torch" in loaded_by(f"import {name}"), name


def room_of(module: str) -> tuple[str, str]:
    """Package and room of a module; the package's own __init__ counts as one of its other modules."""
    _, package, *rest = module.split(".")
    first = rest[0] if rest else ""
    return package, first if first in ROOMS[package] else ""


def wrong_imports(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports against the direction of packages and rooms."""
    found = []
    for module, targets in graph.items():
        if module == "draftcache":
            continue
        package, room = room_of(module)
        for target in targets - {"draftcache"}:
            other, other_room = room_of(target)
            if other != package:
                allowed = other in PACKAGES_BELOW[package]
            else:
                allowed = other_room == room or ROOMS[package][other_room] < ROOMS[package][room]
            if not allowed:
                found.append(f"{module} imports {target}")
    return found


def test_imports_go_one_way() -> None:
    graph = import_graph()
    assert sum(map(len, graph.values())) > 500
    assert not wrong_imports(graph)


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert not circles(import_graph())


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("store.format.rows", "store.reader"),
        ("store.common.files", "capture.job.config"),
        ("capture.verifier.load", "capture.prepare.job"),
        ("draft_train.loss.objective", "draft_train.drafts.protocol"),
        ("draft_train.trainer", "tools.cli"),
    ],
)
def test_an_import_against_the_direction_would_be_noticed(module: str, target: str) -> None:
    graph = import_graph()
    graph[f"draftcache.{module}"] = graph[f"draftcache.{module}"] | {f"draftcache.{target}"}
    assert len(wrong_imports(graph)) == 1


def test_a_circle_would_be_noticed_for_type_checking_too() -> None:
    code = "if TYPE_CHECKING:\n    from draftcache.store import reader\n"
    graph = import_graph()
    graph["draftcache.store.layouts.zarr_reader"] |= imported_modules(code, graph)
    (circle,) = circles(graph)
    assert {"draftcache.store.layouts.zarr_reader", "draftcache.store.reader"} <= set(circle)


def test_files_stay_short() -> None:
    """What is shipped; the demo's corpus and the benchmarks are scripts."""
    scripts = ("draftcache.tools.bench.", "draftcache.tools.demo.corpus.")
    lengths = {
        name: path.read_text(encoding="utf-8").count("\n")
        for name, path in module_files().items()
        if not name.startswith(scripts)
    }
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


def test_every_folder_says_what_it_is() -> None:
    for package in ROOMS:
        text = (ROOT / package / "README.md").read_text(encoding="utf-8")
        rooms = [room for room in ROOMS[package] if (ROOT / package / room).is_dir() and room]
        assert all(f"{room}/" in text for room in rooms), package


def foreign_imports(code: str) -> list[str]:
    """Dotted names of the test modules and conftests that this code imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return [name for name in found if any(part.startswith("test_") or part == "conftest" for part in name.split("."))]


def test_no_test_module_imports_another() -> None:
    """What several of them need is in tests/support, which imports none of them either."""
    paths = [*(ROOT / "tests").glob("test_*.py"), *(ROOT / "tests" / "support").glob("*.py")]
    assert Path(__file__) in paths
    for path in paths:
        found = foreign_imports(path.read_text(encoding="utf-8"))
        assert not found, f"{path}: imports {found}; what it needs of them belongs into tests/support"


@pytest.mark.parametrize(
    "code", ["from test_house import ROOT", "def f():\n    import conftest", "from . import test_house, paths"]
)
def test_such_an_import_would_be_noticed(code: str) -> None:
    """The negative control of the test above."""
    assert len(foreign_imports(code)) == 1
    assert not foreign_imports("import pytest\nfrom support.paths import ROOT")


def test_help_lists_every_command_and_loads_little() -> None:
    """What help loads decides how fast it starts, and unlike seconds it is the same on a busy machine.

    Help adds 46 modules to argparse's own, all of them Python's or the house's; numpy, the negative control, adds 140.
    """
    code = """
import argparse, sys
before = set(sys.modules)
{}
print("\\n", *(set(sys.modules) - before))
"""

    def loaded(statement: str) -> tuple[str, list[str]]:
        command = [sys.executable, "-c", code.format(statement)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        help_text, _, names = printed.rpartition("\n ")
        return help_text, names.split()

    def is_light(names: list[str]) -> bool:
        known = {*sys.stdlib_module_names, "draftcache"}
        return len(names) < 80 and {name.partition(".")[0] for name in names} <= known

    ours = """
from draftcache.tools.cli import main
try:
    main(["--help"])
except SystemExit as exit:
    assert exit.code == 0
"""
    printed, names = loaded(ours)
    assert all(name in printed for name in COMMANDS)
    assert is_light(names), names
    assert not is_light(loaded("import numpy")[1])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_without_torch(name: str) -> None:
    code = f"""
import sys
from draftcache.tools.cli import main
try:
    main([{name!r}, "--help"])
except SystemExit as exit:
    assert exit.code == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"usage: draftcache {name}" in result.stdout


def test_error_exports_are_the_errors() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.DraftcacheError)
    }
    assert set(errors.__all__) == defined
    drawn = errors.__doc__
    assert drawn is not None
    assert all(name in drawn for name in defined)


def test_refusals_exit_with_2_and_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "draftcache.tools.cli",
        "train",
        "--store",
        str(tmp_path),
        "--output",
        str(tmp_path / "o"),
    ]
    result = subprocess.run([*command, "--splits", "train"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert without_times(result.stderr).startswith("draftcache train: error: ")
    assert "Traceback" not in result.stderr
