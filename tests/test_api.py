"""The public Python API: what it exports, that it is light, and that the README's example runs as it stands."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import draftcache
from support.paths import ROOT

ASSETS = ROOT / "tools" / "demo" / "assets"


def test_all_is_what_can_be_had() -> None:
    for name in draftcache.__all__:
        assert getattr(draftcache, name) is not None
    assert set(dir(draftcache)) == set(draftcache.__all__)
    assert draftcache.__all__ == sorted(draftcache.__all__, key=lambda name: (not name[0].isupper(), name))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        draftcache.trian  # type: ignore[attr-defined]  # noqa: B018


def test_the_docstring_names_every_call() -> None:
    assert draftcache.__doc__ is not None
    calls = [name for name in draftcache.__all__ if name[0].islower()]
    assert all(f"    {name}(" in draftcache.__doc__ for name in calls)
    for name in draftcache.__all__:
        if name != "__version__":
            assert getattr(draftcache, name).__doc__, name


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import draftcache, sys; dir(draftcache); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = ("torch", "numpy", "transformers", "draftcache.store", "draftcache.capture", "draftcache.draft_train")
    assert not {name for name in loaded if name.startswith(heavy)}


def test_capture_is_a_package_and_a_call_in_either_order() -> None:
    for code in (
        "from draftcache import capture; import draftcache.capture.job.config as config",
        "import draftcache.capture.job.config as config; from draftcache import capture",
    ):
        check = f"{code}; assert callable(capture); assert config.CaptureConfig"
        subprocess.run([sys.executable, "-c", check], check=True)


def example() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text.partition("\n## From Python\n")[2], re.DOTALL)
    assert isinstance(blocks[0], str)
    return blocks[0]


def test_the_readme_example_runs(tmp_path: Path) -> None:
    """As it stands, on the demo's verifier and a few of its conversations."""
    (tmp_path / "verifier").symlink_to(ASSETS / "verifier")
    for name, count in (("train", 12), ("val", 4)):
        with gzip.open(ASSETS / "conversations" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file][:count]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", example()], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "12 conversations" in done.stdout or "16 conversations" in done.stdout
    assert (tmp_path / "draft" / "model.safetensors").is_file()
    assert len(list((tmp_path / "runs").iterdir())) == 2
