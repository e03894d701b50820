"""What is made of the engine's texts: a store, drafts trained from it, their offline counts, and exports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from draftcache.draft_train.checkpoint import load_state, resolve_checkpoint
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.drafts.serving_target import FORMS
from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.export import export
from draftcache.draft_train.trainer import train
from draftcache.store.common.files import atomic_directory, read_json, write_json
from draftcache.store.common.tensor_files import save_tensors
from draftcache.store.reader import StoreReader
from draftcache.tools.engine_check.subjects import Subject
from draftcache.tools.truth import SPLIT, capture_traces

Traces = Sequence[tuple[Sequence[int], Sequence[int]]]


def captured(traces: Traces, subject: Subject, directory: Path, *, dtype: str, device: str) -> StoreReader:
    """Return the store of these traces, made in `directory` where it is not done."""
    done = directory / "done.json"
    if not done.exists():
        capture_traces(
            traces,
            subject.verifier,
            subject.layers,
            directory,
            vocab_map=subject.vocab_map,
            draft_vocab_size=subject.draft_vocab_size,
            compute_dtype=dtype,
            device=device if subject.on_device else "cpu",
        )
        write_json(done, {"traces": len(traces)})
    return StoreReader(directory / "store")


def trained(name: str, subject: Subject, store: StoreReader, output: Path, *, draft_tokens: int, device: str) -> Path:
    """Return a trained checkpoint of one of `subjects.DRAFTS`. A run that was interrupted goes on."""
    settings = subject.settings_of(name, draft_tokens)
    config = TrainConfig(store=store.location, output=output, splits=(SPLIT,), device=device, **settings)
    return train(config)


def offline_count(checkpoint: Path, store: StoreReader, file: Path, *, draft_tokens: int) -> dict[str, Any]:
    """Return `draftcache eval`'s figures of the draft on the traces, with `steps`, the verify steps of each trace.

    They are computed in float32 on the CPU, and kept in `file`.
    """
    if not file.exists():
        found = evaluate(
            store=store.location,
            checkpoint=checkpoint,
            splits=[SPLIT],
            draft_tokens=draft_tokens,
            device="cpu",
            compute="plain",
            progress=True,
        )
        record = found["conversations"][SPLIT]
        by_trace = [sum(steps for steps, _ in buckets) for buckets in record["counts"]["draft"]]
        order = sorted(range(len(by_trace)), key=lambda number: record["dataset_index"][number])
        figures = found["splits"][SPLIT]["draft"]
        names = ("verify_steps", "tokens", "accepted", "kind", "greedy_agreement", "acceptance_length")
        write_json(file, {name: figures[name] for name in names} | {"steps": [by_trace[number] for number in order]})
    counted: dict[str, Any] = read_json(file)
    return counted


def exported(checkpoint: Path, output: Path, *, form: str, version: str, verifier: Path, dtype: str) -> Path:
    """Return the draft in one of vLLM's two forms, exported where it is not there yet. Raises as `export` does.

    The speculators form names the verifier, and a version of vLLM decides what it can say.
    """
    if output.exists():
        return output
    if form == FORMS[0]:
        return export(checkpoint, output, engine="vllm", dtype=dtype)
    name = str(verifier.absolute())
    return export(checkpoint, output, engine="vllm", engine_version=version, form=form, dtype=dtype, base_model=name)


def wrong_export(draft: Path, output: Path) -> tuple[Path, str]:
    """Return a copy of an export with one mistake that engines don't report, and the mistake in words.

    An Eagle3.1 draft is exported as an Eagle3, without its norms; every other one has tap ids that are off by one.
    """
    config = read_json(draft / "config.json")
    tensors = load_file(draft / "model.safetensors")
    if config.get("norm_output"):
        config |= {"fc_norm": False, "norm_output": False}
        tensors = {name: value for name, value in tensors.items() if not name.startswith("fc_norm.")}
        mistake = "Eagle3.1's norms left out"
    else:
        mistake = "tap ids off by one"
        for holder, key in (
            (config, "eagle_aux_hidden_state_layer_ids"),
            (config.get("eagle_config"), "eagle_aux_hidden_state_layer_ids"),
            (config, "target_layer_ids"),
            (config.get("dflash_config"), "target_layer_ids"),
            (config, "aux_hidden_state_layer_ids"),  # of the speculators form
        ):
            if isinstance(holder, dict) and key in holder:
                shift = -1 if min(holder[key]) > 0 else 1
                holder[key] = [number + shift for number in holder[key]]
    if not output.exists():
        with atomic_directory(output) as partial:
            save_tensors(partial / "model.safetensors", tensors, metadata={"format": "pt"})
            write_json(partial / "config.json", config)
    return output, mistake


def method_of(draft: Path) -> str:
    """Return vLLM's name of the way in which it serves an export."""
    classes = {"DFlashDraftModel": "dflash", "Qwen3DSparkModel": "dspark"}
    return classes.get(read_json(draft / "config.json")["architectures"][0], "eagle3")


def proposed_tokens(checkpoint: Path) -> int | None:
    """Return the draft tokens of a whole block of a block draft; None for a draft that proposes any number."""
    shape = load_state(resolve_checkpoint(checkpoint)).shape
    return shape.steps if isinstance(shape, BlockShape) else None
