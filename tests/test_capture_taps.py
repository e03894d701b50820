"""Any number of taps, the last block's output among them: against hooks on the model, and as parts of one another."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.verifier.ssm_precision import enforce_contract
from draftcache.draft_train.drafts.sizes import VerifierShape
from draftcache.store.common.errors import InputError
from draftcache.store.convert import Conversion
from draftcache.store.reader import StoreReader
from draftcache.store.verify import verify_store
from draftcache.tools.cli import main
from support.capture_jobs import config, prepare_rows, write_rows
from support.tiny_models import KINDS, make_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
BLOCKS = 6
EVERY = tuple(range(BLOCKS))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    return prepare_rows(root / "prepared", tokenizer_dir, write_rows(root / "rows.jsonl", rows=5))


@pytest.fixture(scope="module", params=KINDS)
def verifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / str(request.param)
    make_model(request.param, "MEM*EM", BLOCKS).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whole(verifier: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of all six taps."""
    return captured(verifier, dataset, tmp_path_factory.mktemp("whole") / "store", EVERY)


def captured(verifier: Path, dataset: Path, output: Path, layers: tuple[int, ...], **changes: Any) -> Path:
    CaptureJob(config(verifier, dataset, output, layers=layers, **{"mode": "float32"} | changes)).run()
    return output


def hooked(verifier: Path, token_ids: torch.Tensor) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Outputs [L, 32] of every block of the saved model by its own code, and the final norm's output [L, 32]."""
    model = make_model(verifier.name, "MEM*EM", BLOCKS)
    enforce_contract(model, verifier, allow_fallback=False)
    norm = model.model.norm if verifier.name == "llama" else model.model.norm_f
    found: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        return lambda _module, _inputs, output: found.update(
            {number: (output[0] if isinstance(output, tuple) else output)[0]}
        )

    for number, block in enumerate([*model.model.layers, norm]):
        block.register_forward_hook(keep(number))
    with torch.inference_mode():
        model(input_ids=token_ids[None], use_cache=False)
    return found, found.pop(BLOCKS)


def shard_files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in (root / "shards").rglob("*") if path.is_file()}


def test_every_tap_is_its_blocks_output_and_the_last_one_is_before_the_final_norm(verifier: Path, whole: Path) -> None:
    store = StoreReader(whole)
    assert store.manifest.layers == EVERY
    for number in (0, len(store) - 1):
        arrays = store.read(number).arrays
        outputs, final = hooked(verifier, torch.from_numpy(arrays["token_ids"].astype(np.int64)))
        rows = arrays["positions"]
        for layer in EVERY:
            np.testing.assert_allclose(arrays[f"tap_{layer}"], outputs[layer][rows], rtol=1e-4, atol=1e-5)
        assert not np.allclose(arrays[f"tap_{BLOCKS - 1}"], final[rows], rtol=1e-2, atol=1e-2)
        assert not np.allclose(arrays[f"tap_{BLOCKS - 1}"], arrays[f"tap_{BLOCKS - 2}"], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("layers", [(5,), (0, 1, 2, 4, 5)])
def test_a_copy_with_some_taps_is_what_a_capture_of_them_writes(
    verifier: Path, dataset: Path, whole: Path, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    fewer = captured(verifier, dataset, tmp_path / "fewer", layers)
    chosen = ",".join(map(str, layers))
    assert main(["convert", str(whole), str(tmp_path / "copy"), "--layers", chosen]) == 0
    assert shard_files(tmp_path / "copy") == shard_files(fewer)
    assert StoreReader(tmp_path / "copy").manifest.hash == StoreReader(fewer).manifest.hash
    assert not verify_store(tmp_path / "copy").damages
    assert VerifierShape.of(StoreReader(tmp_path / "copy"), 0).taps == len(layers)


@pytest.mark.parametrize("layers", [(5,), (0, 1, 2, 4, 5), EVERY])
def test_the_size_is_foretold(
    dataset: Path, verifier: Path, whole: Path, tmp_path: Path, layers: tuple[int, ...], capsys: Any
) -> None:
    store = tmp_path / "store"
    Conversion(whole, store, layers=layers).run()
    asked = {"verifier": verifier, "dataset": dataset, "layers": ",".join(map(str, layers)), "window": 20, "top-k": 16}
    asked |= {"mode": "float32", "shard-tokens": 200, "draft-vocab-size": 200, "compute-dtype": "float32"}
    assert main(["size", "--json", *[word for name, value in asked.items() for word in (f"--{name}", str(value))]]) == 0
    found = json.loads(capsys.readouterr().out)["modes"]["float32"]["shard_bytes"]
    assert found == pytest.approx(StoreReader(store).bytes_on_disk(), rel=0.05)


def test_the_command_for_a_tap_that_is_not_stored_captures_it(
    verifier: Path, dataset: Path, whole: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    Conversion(whole, copy, layers=(1, 5), mode="lossless").run()
    with pytest.raises(
        InputError, match=r"taps \[1, 5\] of .*copy, found \[3\] beside them, .*not captured"
    ) as refused:
        Conversion(copy, tmp_path / "other", layers=(1, 3))
    places = {"VERIFIER": verifier, "DATASET": dataset, "STORE": tmp_path / "again"}
    _, command = str(refused.value).split("its dataset: draftcache ")
    words = [str(places.get(word, word)) for word in shlex.split(command)]
    assert main([*words, "--device", "cpu"]) == 0
    again, made = StoreReader(tmp_path / "again").manifest, StoreReader(copy).manifest
    assert again.layers == (1, 3, 5)
    for name in ("splits", "window", "teacher", "top_k", "mode", "layout", "compute_dtype", "shard_tokens"):
        assert getattr(again, name) == getattr(made, name), name
    for wrong in ((), (3, 1), (1, 1), (1, 6), (-1,)):
        with pytest.raises(InputError, match="ascending, distinct block numbers from 0 to 5"):
            Conversion(copy, tmp_path / "other", layers=wrong)
