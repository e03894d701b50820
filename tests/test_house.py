"""The house rules that a machine can hold: import direction, light start-up, honest exports."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from draftcache.store.common import errors
from draftcache.tools.cli import COMMANDS

ROOT = Path(__file__).parents[1]
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


def test_help_is_fast_and_lists_every_command() -> None:
    times = []
    for _ in range(3):
        started = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-m", "draftcache.tools.cli", "--help"], capture_output=True, text=True, check=True
        )
        times.append(time.monotonic() - started)
        assert all(name in result.stdout for name in COMMANDS)
    assert min(times) < 0.5


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
