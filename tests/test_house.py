"""The house rules that a machine can hold: import direction, light start-up, honest exports."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.paths import ROOT

from draftcache.store.common import errors
from draftcache.tools.cli import COMMANDS

PACKAGES = ("store", "capture", "draft_train", "tools")
ALLOWED = {
    "store": {"store"},
    "capture": {"capture", "store"},
    "draft_train": {"draft_train", "store"},
    "tools": set(PACKAGES),
}


def loaded_by(code: str) -> set[str]:
    command = f"{code}; import sys; print(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def every_module_of(package: str, *, but: str = "") -> str:
    paths = [path for path in (ROOT / package).glob("*.py") if path.stem not in ("__init__", but)]
    return "; ".join(f"import draftcache.{package}.{path.stem}" for path in sorted(paths))


def test_draft_train_loads_no_verifier() -> None:
    modules = loaded_by(every_module_of("draft_train"))
    assert "torch" in modules
    assert not {name for name in modules if name.startswith(("transformers", "mamba_ssm", "draftcache.capture"))}


def test_store_needs_neither_torch_nor_transformers() -> None:
    """Only the codecs' form for tensors does: whoever imports it has torch already."""
    modules = loaded_by(every_module_of("store", but="torch_codecs"))
    assert not {
        name
        for name in modules
        if name.startswith(("torch", "transformers", "draftcache.capture", "draftcache.draft_train"))
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = {name.split(".")[1] for name in names if name.startswith("draftcache.")}
            assert ours <= ALLOWED[package], f"{path}: imports {ours}"


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


def timed(*words: str) -> tuple[float, str]:
    """Seconds that Python took under these words, and what it printed."""
    started = time.monotonic()
    result = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True)
    return time.monotonic() - started, result.stdout


def test_help_is_fast_and_lists_every_command() -> None:
    """Beside Python's own start with argparse, so that neither a slow machine nor a busy one decides.

    Help takes 1.0 to 1.6 times as long as that start, and an import of numpy alone, the negative control, 5 times.
    """
    ours, least, with_numpy = [], [], []
    for _ in range(5):
        least.append(timed("-c", "import argparse")[0])
        took, printed = timed("-m", "draftcache.tools.cli", "--help")
        ours.append(took)
        assert all(name in printed for name in COMMANDS)
        with_numpy.append(timed("-c", "import argparse, numpy")[0])
    assert min(ours) < 3 * min(least) < min(with_numpy), (ours, least, with_numpy)


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
    assert result.stderr.startswith("draftcache train: error: ")
    assert "Traceback" not in result.stderr
