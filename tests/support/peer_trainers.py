"""Run with other projects' packages on the path: their own code reads or writes a cache.

`python peer_trainers.py ACTION FOLDER OUTPUT` writes what their reader gives of FOLDER to the safetensors file OUTPUT,
under the names `N.name`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def read_specforge(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    from specforge.algorithms.eagle3.data import normalize_offline_sample
    from specforge.data.preprocessing import OfflineEagle3Dataset
    from specforge.runtime.data_plane.feature_store import load_feature_file
    from specforge.runtime.data_plane.offline_reader import OfflineManifestReader

    for reference in OfflineManifestReader(str(folder), validate_files=True).read():
        raw = load_feature_file(reference.feature_store_uri.removeprefix("file://"))
        sample = normalize_offline_sample(raw, 4096)
        other = OfflineEagle3Dataset.process_data(raw, 4096)
        assert all(torch.equal(values, other[name]) for name, values in sample.items())
        yield sample


def read_speculators(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    from speculators.data_generation.offline import check_hidden_states
    from speculators.train.data import ArrowDataset

    dataset = ArrowDataset(4096, folder, on_missing="raise", hidden_states_dtype=torch.float32)
    for number in range(len(dataset)):
        check_hidden_states(dataset.transfer.get_cached(number), dataset.data[number]["input_ids"].tolist())
        yield dataset[number]


def read_modelopt(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    from modelopt.torch.speculative.eagle.utils import OfflineSupervisedDataset

    dataset = OfflineSupervisedDataset(sorted(folder.glob("*.pt")), answer_only_loss=True)
    for number in range(len(dataset)):
        item = dataset[number]
        yield {name: torch.tensor(value) if isinstance(value, bool) else value for name, value in item.items()}


def write_float8(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Rewrite every file of a folder as the FP8 connector does; yields what its reader makes of them."""
    from hs_connectors.fp8_utils import SCALES_KEY, quantize_tensor_to_fp8
    from hs_connectors.transfer import FP8Transfer

    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors = load_file(path)
        states, scales = quantize_tensor_to_fp8(tensors["hidden_states"])
        save_file(tensors | {"hidden_states": states, SCALES_KEY: scales}, path)
        yield FP8Transfer(folder).get_cached(number)


def capture_automodel(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Write FOLDER/cache, of FOLDER/model and the padded rows of FOLDER/rows.safetensors; yields what its reader gives.

    The states are those that Automodel's own target wrapper captures, of the blocks 0, 1 and the last one.
    """
    from transformers import AutoModelForCausalLM

    from draftcache.tools.bench.parts.peer_wheels import automodel_module

    cache = automodel_module("datasets.llm.dspark_cache")
    target = automodel_module("speculative.dspark.target")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    last = model.config.num_hidden_layers - 1
    wrapper = target.HFDSparkTargetModel(model, target_layer_ids=[0, 1, last])
    rows = load_file(folder / "rows.safetensors")
    output, count, per_shard = str(folder / "cache"), len(rows["input_ids"]), 2
    cache.write_target_weights(output, model.get_input_embeddings(), model.get_output_embeddings(), torch.float32)
    manifest = cache.build_cache_manifest(
        target_model="somebody/a-model", target_model_type="llama", target_text_config=model.config,
        seq_length=rows["input_ids"].shape[1], dtype="fp32", num_samples=count, shard_size=per_shard,
        target_layer_ids=wrapper.target_layer_ids, train_data_path="rows", train_split=None, shuffle_seed=0,
        mask_reasoning_content=False, chat_template_sha256="",
    )  # fmt: skip
    cache.write_manifest(output, {**manifest, "complete": True})
    for first in range(0, count, per_shard):
        batch = {name: values[first : first + per_shard] for name, values in rows.items()}
        with torch.no_grad():
            found = wrapper.generate_batch(**batch)
        cache.write_shard(output, first // per_shard, cache.compute_batch_cache(found, torch.float32))
    yield from iter(cache.CachedDSparkDataset(output))


if __name__ == "__main__":
    action, source, output = sys.argv[1:]
    found = {}
    for number, item in enumerate(globals()[action](Path(source))):
        found |= {f"{number}.{name}": values.clone().contiguous() for name, values in item.items()}
    save_file(found, output)
