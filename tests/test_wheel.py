"""What `pip install draftcache` puts on a machine: one package, nothing beside it, and a command that answers."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import draftcache
from support.paths import ROOT

CONSUMER = """\
from pathlib import Path

import draftcache

config = draftcache.TrainConfig(store="s", output=Path("o"), splits=("train",))
last: Path = draftcache.train(config)
report = draftcache.verify_store("s")
damages: list[str] = [damage.name for damage in report.damages]
summary = draftcache.capture(
    draftcache.CaptureConfig(verifier=Path("v"), dataset=Path("d"), output="s", layers=(1,))
)
shards: int = summary.shards
wrong: int = draftcache.open_store("s").location
"""


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows, so that nothing stale in the checkout gets in."""
    directory = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    archive = subprocess.run(
        ["tar", "--null", "--files-from=-", "--create"], cwd=ROOT, input=tracked, capture_output=True, check=True
    )
    source = directory / "source"
    source.mkdir()
    subprocess.run(["tar", "--extract"], cwd=source, input=archive.stdout, check=True)
    run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
        "--wheel-dir", directory, source,
    )  # fmt: skip
    (found,) = directory.glob("*.whl")
    return found


def test_the_wheel_holds_one_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"draftcache", f"draftcache-{draftcache.__version__}.dist-info"}
    for wanted in (
        "draftcache/py.typed",
        "draftcache/store/reader.py",
        "draftcache/draft_train/drafts/eagle3/architecture.py",
        "draftcache/capture/prepare/templates/nemotron_chatml.jinja",
        "draftcache/tools/demo/assets/verifier/model.safetensors",
    ):
        assert wanted in names
    unwanted = ("draftcache/tools/bench", "draftcache/tools/demo/corpus", "draftcache/tests")
    assert not [name for name in names if name.startswith(unwanted)]


def test_an_empty_environment_gets_nothing_else(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    assert {path.name for path in packages.iterdir()} == {
        "draftcache",
        f"draftcache-{draftcache.__version__}.dist-info",
    }
    # The user's own store.py and tools.py are imported by nobody, and hide nothing.
    (tmp_path / "store.py").write_text("raise AssertionError\n")
    (tmp_path / "tools.py").write_text("raise AssertionError\n")
    version = f"draftcache {draftcache.__version__}\n"
    assert run(tmp_path / "venv" / "bin" / "draftcache", "--version", cwd=tmp_path) == version
    code = "import draftcache, draftcache.store.common.errors; print(draftcache.__version__)"
    assert run(python, "-c", code, cwd=tmp_path) == f"{draftcache.__version__}\n"


@pytest.mark.slow
def test_a_consumer_in_another_folder_is_type_checked(tmp_path: Path) -> None:
    """mypy follows the editable installation, and knows the public calls."""
    (tmp_path / "consumer.py").write_text(CONSUMER)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "consumer.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "consumer.py:13: error: Incompatible types in assignment" in done.stdout, done.stdout + done.stderr
    assert "Found 1 error in 1 file" in done.stdout, done.stdout
