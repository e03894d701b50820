"""Every trap of a served draft: a good export has no finding, and one change of it has exactly the trap's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftcache.draft_train.drafts.serving_target import VerifierFacts
from draftcache.draft_train.export import export
from draftcache.draft_train.served_report import check_export
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.tools.cli import main
from support.synthetic import DRAFT_VOCAB, HIDDEN, LAYERS, VOCAB, manifest, write_store
from support.training_runs import config

MASK_TOKEN = VOCAB - 1
RUNS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle31": {"eagle31": True},
    "dflash": {"draft": "dflash", "num_hidden_layers": 2, "block_size": 4, "ttt_steps": 0},
    "dspark": {"draft": "dspark", "num_hidden_layers": 2, "block_size": 4, "ttt_steps": 0, "attention_sinks": True},
    "dspark-plain": {"draft": "dspark", "num_hidden_layers": 2, "block_size": 4, "ttt_steps": 0},
}
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("eagle3", "eagle31", "dflash", "dspark")},
    "eagle3-sglang": ("eagle3", {"engine": "sglang"}),
    "eagle3-speculators": ("eagle3", {"form": "speculators"}),
    "eagle31-speculators": ("eagle31", {"form": "speculators"}),
    "dspark-speculators": ("dspark-plain", {"form": "speculators", "engine_version": "0.32.0"}),
}
"""By name, the run and how it is exported."""


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of good exports, by the names of EXPORTS."""
    root = tmp_path_factory.mktemp("drafts")
    write_store(root / "store", tokens=MASK_TOKEN)
    for name, changes in RUNS.items():
        Trainer(config(root, output=root / name, epochs=1, **changes)).run()
    for name, (run, how) in EXPORTS.items():
        export(root / run, root / "exports" / name, **{"engine": "vllm", "dtype": "float32"} | how)
    return root / "exports"


@dataclass
class Parts:
    """A draft's files, which a trap changes."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def layer(self) -> dict[str, Any]:
        inner: dict[str, Any] = self.config.get("transformer_layer_config", self.config)
        return inner


Change = Callable[[Parts], Any]
AUX, NESTED = "eagle_aux_hidden_state_layer_ids", "eagle_config"


def set_ids(*ids: int) -> Change:
    """Write these ids in both places, as if somebody had exported them."""

    def change(parts: Parts) -> None:
        parts.config[AUX] = list(ids)
        if NESTED in parts.config:
            parts.config[NESTED] = {AUX: list(ids), "use_aux_hidden_state": True}

    return change


def somebody_elses(change: Change) -> Change:
    """What draftcache wrote down of the export is not there."""

    def changed(parts: Parts) -> None:
        parts.config.pop("draftcache")
        parts.config.pop("target_hidden_state_indices")
        change(parts)

    return changed


def drop(*names: str) -> Change:
    """Leave these fields or tensors out, wherever they are."""

    def change(parts: Parts) -> None:
        for name in names:
            assert sum(holder.pop(name, parts) is not parts for holder in (parts.config, parts.tensors, parts.layer))

    return change


def put(**fields: Any) -> Change:
    """Set these fields of the layer."""
    return lambda parts: parts.layer.update(fields)


def tensor(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda parts: parts.tensors.update({name: make(parts.tensors[name]).contiguous()})


def absolute_d2t(parts: Parts) -> None:
    parts.tensors["d2t"] = parts.tensors["d2t"] + torch.arange(DRAFT_VOCAB)


def both(*changes: Change) -> Change:
    return lambda parts: [change(parts) for change in changes]


def dflash(**fields: Any) -> Change:
    return lambda parts: parts.config["dflash_config"].update(fields)


def drop_nested_ids(parts: Parts) -> None:
    del parts.config["dflash_config"]["target_layer_ids"]


def unsorted_blocks(parts: Parts) -> None:
    somebody_elses(both(dflash(target_layer_ids=[3, 1, 4]), drop("target_layer_ids")))(parts)


def top(**fields: Any) -> Change:
    """Set these fields of config.json, beside the layer."""
    return lambda parts: parts.config.update(fields)


def as_it_is(parts: Parts) -> None:
    """The draft is good for what it was exported for, and looked at for something else."""


def prefixed(parts: Parts) -> None:
    kept = ("d2t", "t2d", "lm_head.weight")
    parts.tensors = {name if name in kept else f"model.{name}": value for name, value in parts.tensors.items()}


IDS = [layer + 1 for layer in LAYERS]
SMALL_VERIFIER = VerifierFacts(layers=LAYERS[-1] + 1, max_position_embeddings=1024)
"""A verifier whose last block is the last tap."""
TWELVE = {"verifier": VerifierFacts(layers=12)}
"""A verifier whose states 2, 6 and 9 an engine takes by itself."""
full_layers = put(layer_types=["full_attention"] * 2, sliding_window=None, use_sliding_window=False)
SGLANG_0_5_12 = {"engine": "sglang", "engine_version": "0.5.12"}
verifiers_head = both(drop("lm_head.weight", "d2t", "t2d"), top(draft_vocab_size=VOCAB))
TRAPS: list[tuple[str, str, Change, dict[str, Any]]] = [
    # aux ids
    ("aux-ids-missing", "eagle3", drop(AUX, NESTED), {}),
    ("aux-ids-missing", "eagle3-speculators", drop(AUX), {}),
    ("aux-ids-missing", "dflash", both(drop("target_layer_ids"), drop_nested_ids), {}),
    ("aux-ids-missing", "dspark-speculators", drop("aux_hidden_state_layer_ids"), {}),
    ("aux-ids-nested-only", "eagle3", drop(AUX), {}),
    ("aux-ids-nested-only", "dspark", drop("target_layer_ids"), {}),
    ("aux-ids-top-level-only", "eagle3-sglang", drop(NESTED), {}),
    ("aux-ids-top-level-only", "dflash", drop_nested_ids, {}),
    ("aux-ids-disagree", "eagle3", lambda p: p.config[NESTED].update({AUX: list(LAYERS)}), {}),
    ("aux-ids-disagree", "dflash", top(target_layer_ids=IDS), {}),
    ("aux-ids-disagree", "dspark", somebody_elses(lambda p: p.config.update({AUX: list(LAYERS)})), {}),
    ("aux-ids-off-by-one", "eagle3", set_ids(*LAYERS), {}),
    ("aux-ids-off-by-one", "eagle3-sglang", set_ids(*IDS), {}),
    ("aux-ids-off-by-one", "eagle3-speculators", set_ids(*LAYERS), {}),
    ("aux-ids-off-by-one", "eagle3", as_it_is, {"engine": "sglang", "verifier": VerifierFacts(layers=6)}),
    ("aux-ids-off-by-one", "dflash", both(dflash(target_layer_ids=IDS), put(target_layer_ids=IDS)), {}),
    ("aux-ids-off-by-one", "dspark-speculators", top(aux_hidden_state_layer_ids=list(LAYERS)), {}),
    ("aux-ids-unsorted", "eagle3", somebody_elses(set_ids(4, 2, 5)), {}),
    ("aux-ids-unsorted", "eagle3", somebody_elses(set_ids(2, 4, 4)), {}),
    ("aux-ids-unsorted", "dflash", unsorted_blocks, {}),
    ("aux-ids-past-the-end", "eagle3", somebody_elses(set_ids(2, 4, 7)), {"verifier": VerifierFacts(layers=6)}),
    ("aux-ids-past-the-end", "dflash", as_it_is, {"verifier": VerifierFacts(layers=4)}),
    ("aux-ids-last-block", "eagle3-sglang", as_it_is, {"verifier": SMALL_VERIFIER}),
    ("aux-ids-count", "eagle31-speculators", put(num_aux_hidden_states=2), {}),
    # vocabulary and head
    ("head-missing", "eagle3", drop("lm_head.weight"), {}),
    ("head-missing", "dspark", drop("lm_head.weight"), {}),
    ("head-shape", "eagle3", tensor("lm_head.weight", lambda head: head[:-1]), {}),
    ("d2t-missing", "eagle3", drop("d2t"), {}),
    ("d2t-shape", "eagle3", tensor("d2t", lambda d2t: d2t[:-1]), {}),
    ("d2t-dtype", "eagle3", tensor("d2t", lambda d2t: d2t.double().to(torch.int16)), {}),
    ("d2t-absolute", "eagle3", absolute_d2t, {}),
    ("d2t-absolute", "dspark", both(absolute_d2t, drop("t2d")), {}),
    ("d2t-range", "eagle3", both(tensor("d2t", lambda d2t: d2t * 0 + VOCAB), drop("t2d")), {}),
    ("d2t-repeats", "eagle3", both(tensor("d2t", lambda d2t: torch.arange(DRAFT_VOCAB) % 2), drop("t2d")), {}),
    ("d2t-t2d", "eagle3", tensor("t2d", lambda t2d: t2d.flip(0)), {}),
    ("t2d-shape", "eagle3", tensor("t2d", lambda t2d: t2d[:-1]), {}),
    ("tied-embeddings", "eagle3", put(tie_word_embeddings=True), {}),
    ("tied-embeddings", "dspark-speculators", put(tie_word_embeddings=True), {}),
    # windows
    ("window-without-layer-types", "eagle3", drop("layer_types"), {}),
    ("window-without-layer-types", "eagle3-speculators", drop("layer_types"), {}),
    ("window-without-layer-types", "dspark", drop("layer_types"), {}),
    ("window-without-layer-types", "eagle3", put(layer_types=["full_attention"]), {}),
    ("layer-types-without-window", "eagle3", put(sliding_window=None), {}),
    ("layer-types-count", "dflash", put(layer_types=["sliding_attention"]), {}),
    ("window-switched-off", "dflash", put(use_sliding_window=False), {}),
    ("layer-types-not-read", "dflash", verifiers_head, {"engine": "sglang", "engine_version": "0.5.13"}),
    # RoPE
    ("rope-missing", "eagle3", drop("rope_theta", "rope_parameters"), {}),
    ("rope-theta-not-read", "dflash", both(verifiers_head, full_layers), SGLANG_0_5_12),
    ("rope-disagrees", "eagle3", put(rope_theta=1e6), {}),
    ("rope-disagrees", "dflash", put(rope_scaling={"rope_type": "yarn", "factor": 4.0}), {}),
    ("rope-disagrees", "eagle3-speculators", put(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {}),
    # what remains
    ("max-positions", "eagle3", put(max_position_embeddings=0), {}),
    ("max-positions", "dspark-speculators", drop("max_position_embeddings"), {}),
    ("dtype", "eagle3", put(dtype="bfloat16"), {}),
    ("dtype", "eagle3", put(torch_dtype="float16"), {}),
    ("norm-before-residual", "eagle3-speculators", drop("norm_before_residual"), {}),
    ("norms", "eagle31", top(fc_norm=False), {}),
    ("norms", "eagle31", top(norm_output=None), {}),
    ("norms", "eagle31", drop("fc_norm.1.weight"), {}),
    ("tensor-prefix", "eagle3", prefixed, {}),
    ("tensor-missing", "eagle3", drop("midlayer.mlp.up_proj.weight"), {}),
    ("tensor-missing", "dspark", drop("markov_head.markov_w2.weight"), {}),
    ("tensor-missing", "dspark", drop("layers.1.self_attn.attention_sink_bias"), {}),
    ("tensor-shape", "eagle3", tensor("fc.weight", lambda weight: weight[:, :-1]), {}),
    ("mask-token", "dspark", top(mask_token_id=VOCAB), {}),
    ("mask-token", "dspark-speculators", drop("mask_token_id"), {}),
    ("engine", "eagle3-sglang", as_it_is, {"verifier": VerifierFacts(model_type="nemotron_h")}),
    ("engine", "dflash", as_it_is, {"engine": "sglang"}),
    ("engine", "eagle3-speculators", somebody_elses(put(eagle_config={AUX: IDS})), {"engine": "sglang"}),
    ("sizes", "eagle3", as_it_is, {"verifier": VerifierFacts(vocab_size=VOCAB + 1)}),
    ("sizes", "eagle3", as_it_is, {"verifier": VerifierFacts(hidden_size=2 * HIDDEN)}),
    ("speculators-fields", "eagle3-speculators", lambda p: p.config["speculators_config"].update(verifier={}), {}),
]  # fmt: skip
"""The trap, the export, what is changed of it, and what else the check is told. Each is an error."""
WARNINGS: list[tuple[str, str, Change, dict[str, Any]]] = [
    ("aux-ids-off-by-one", "eagle3", somebody_elses(set_ids(1, 3, 4)), {}),
    ("aux-ids-off-by-one", "eagle3", somebody_elses(set_ids(1, 5, 8)), TWELVE),
    ("aux-ids-off-by-one", "eagle3-sglang", somebody_elses(set_ids(2, 6, 9)), {"engine": "sglang", **TWELVE}),
    ("head-missing", "eagle3", verifiers_head, {}),
    ("tied-embeddings", "eagle3", drop("tie_word_embeddings"), {}),
    ("rope-new-schema-only", "eagle3", drop("rope_theta", "rope_scaling"), {}),
    ("rope-old-schema-only", "dflash", drop("rope_parameters"), {}),
    ("max-positions", "eagle3", as_it_is, {"verifier": VerifierFacts(max_position_embeddings=4096)}),
    ("max-positions", "eagle3", put(max_position_embeddings=2048), {}),
    ("dtype", "eagle3", drop("dtype"), {}),
    ("mixed-dtypes", "eagle3", tensor("norm.weight", lambda weight: weight.bfloat16()), {}),
    ("norm-before-residual", "eagle3", drop("norm_before_residual"), {}),
    ("engine", "dspark", as_it_is, {"engine": "sglang"}),
    ("engine-version", "eagle3-sglang", as_it_is, {"verifier": VerifierFacts(model_type="deepseek_v3")}),
    ("engine-version", "dflash", verifiers_head, {"engine": "sglang"}),
    ("window-by-command", "eagle3-sglang", as_it_is, {}),
]  # fmt: skip
"""Likewise, where the draft may be right."""


def changed(drafts: Path, name: str, change: Change, tmp_path: Path) -> Path:
    path = tmp_path / "draft"
    shutil.copytree(drafts / name, path)
    parts = Parts(json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors"))
    change(parts)
    (path / "config.json").write_text(json.dumps(parts.config))
    save_file(parts.tensors, path / "model.safetensors")
    return path


@pytest.mark.parametrize("name", EXPORTS)
def test_a_good_export_has_no_finding(drafts: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control of every trap, with all that is known of the verifier."""
    known = VerifierFacts.of_manifest(manifest().verifier)
    for verifier in (None, known):
        traps = [item.trap for item in check_export(drafts / name, verifier=verifier).findings]
        assert traps == (
            ["window-by-command"] if name == "eagle3-sglang" else []
        )  # nothing in the files can help there
    assert main(["export", "--check", str(drafts / name), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["errors"], len(found["findings"])) == (0, name == "eagle3-sglang")
    assert found["engine"] == EXPORTS[name][1].get("engine", "vllm")
    assert found["form"] == EXPORTS[name][1].get("form", "classic")


@pytest.mark.parametrize(
    ("level", "row"),
    [
        pytest.param(level, row, id=f"{level}-{row[0]}-{row[1]}")
        for level, table in (("error", TRAPS), ("warning", WARNINGS))
        for row in table
    ],
)
def test_a_trap_is_found_and_nothing_else(
    drafts: Path, tmp_path: Path, level: str, row: tuple[str, str, Change, dict[str, Any]]
) -> None:
    trap, name, change, told = row
    path = changed(drafts, name, change, tmp_path)
    found = check_export(path, **told).findings
    seen = {(item.level, item.trap) for item in found}
    if trap != "window-by-command":  # all Eagle3 drafts with a window have it in SGLang
        seen -= {("warning", "window-by-command")}
    assert seen == {(level, trap)}, [str(item) for item in found]
    for item in found:
        assert all((item.where, item.expected, item.found, item.advice))


def test_a_checkpoint_that_is_no_draft_is_refused(drafts: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a draft's directory with config\.json"):
        check_export(tmp_path)
    path = changed(drafts, "eagle3", top(architectures=["LlamaForCausalLM"]), tmp_path)
    with pytest.raises(InputError, match=r"expected a draft, .* found \['LlamaForCausalLM'\]"):
        check_export(path)
    (path / "config.json").write_text((drafts / "eagle3" / "config.json").read_text())
    (path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="expected a safetensors file"):
        check_export(path)
    (path / "model.safetensors").unlink()
    assert [item.trap for item in check_export(path).errors] == ["weights-missing"]
    (path / "pytorch_model.bin").write_bytes(b"a pickle, which is not read")
    assert [(item.level, item.trap) for item in check_export(path).findings] == [("warning", "weights-missing")]
    with pytest.raises(InputError, match=r"--verifier .*expected a model's directory"):
        check_export(path, verifier=tmp_path)


def test_a_verifiers_config_and_weights_in_several_files_are_read(drafts: Path, tmp_path: Path) -> None:
    path = changed(drafts, "eagle3", as_it_is, tmp_path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = {name: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: value for name, value in tensors.items() if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    verifier = tmp_path / "verifier"
    verifier.mkdir()
    text = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "hybrid_override_pattern": "M-M*-M", "model_type": "nemotron_h"}
    (verifier / "config.json").write_text(json.dumps({"architectures": ["X"], "text_config": text}))
    facts = VerifierFacts.of_config(verifier)
    assert (facts.layers, facts.nemotron_h) == (6, True)
    assert check_export(path, verifier=verifier).findings == ()
    assert {item.trap for item in check_export(path, verifier=verifier, engine="sglang").errors} >= {"engine"}


def test_a_check_exits_with_1_and_says_what_to_do(
    drafts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(drafts, "eagle3", both(drop(AUX), drop("dtype")), tmp_path)
    assert main(["export", "--check", str(path)]) == 1
    said = capsys.readouterr().out
    assert "ERROR aux-ids-nested-only: eagle_aux_hidden_state_layer_ids: expected the ids of eagle_config." in said
    assert "WARNING dtype: dtype: expected the weights' ['float32'], found none; write it" in said
    assert "eagle3 in the classic form, looked at for vllm: errors 1, warnings 1" in said
    assert main(["export", "--check", str(path), "--output", "x", "--force"]) == 2
    assert "found --output, --force" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["export", "--output", "x"])
    assert "required: --checkpoint, --engine" in capsys.readouterr().err


def test_the_exporter_publishes_nothing_that_its_own_check_refuses(drafts: Path, tmp_path: Path) -> None:
    """SGLang does not hand over the output of a Llama's last block: found when the export is read back."""
    write_store(tmp_path / "store", verifier=manifest().verifier | {"layers": LAYERS[-1] + 1})
    run = Trainer(config(tmp_path, epochs=1)).run()
    with pytest.raises(CheckpointError, match=r"nothing was exported: .*expected outputs of blocks before the last"):
        export(run, tmp_path / "draft", engine="sglang")
    assert not (tmp_path / "draft").exists()
    export(run, tmp_path / "draft", engine="vllm")
