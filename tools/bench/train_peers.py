"""Training steps of SpecForge, NeMo Automodel and speculators for the 30B verifier's draft, from their own wheels.

    pip download --no-deps --dest WHEELS specforge==0.2.0 nemo-automodel==0.7.0 speculators==0.9.0
    python -m draftcache.tools.bench.train_peers --peer-wheels WHEELS [--length 32768] [--output FILE]

This needs one GPU of 80 GB, torch with triton, and transformers, and for speculators a C compiler. It times each
project's trainer core as the project's offline recipe runs it: forward, backward and optimizer step of one conversation
with loss on every row, on random states and weights, with no data loader and nothing to copy to the GPU. The Eagle3
drafts have no window.

- SpecForge: `OnlineEagle3Model` with flex attention and the compact teacher, which computes the verifier's
  probabilities from its last hidden states inside the step; AdamW over float32 master weights.
- Automodel: `Eagle3TrainerModule` on probabilities over the draft vocabulary, which its cache holds in bf16; AdamW on
  bf16 weights. Its FlashAttention-2 comes from torch, which contains the same kernels as the flash-attn package. Its
  input forms are tried in turn (a padded batch, a packed batch, and a packed batch with its `compile` option), and the
  fastest form is reported.

- speculators: its `DSparkDraftModel`, at the shape of the case `dspark-32k` of `train`; parts/peer_blocks.py says what
  it computes otherwise. Its anchors are bounded by memory: it is timed with 3,072 (`peer-dspark-32k`; compare it with
  `dspark-32k-3072-anchors`), and with more of them (`peer-dspark-32k-6144-anchors`, ...) until they don't fit.
  `anchor_s` is anchors per second, and `anchors` their number in a step.

`tok_s` is tokens over the median of 3 steps after 2 that are not counted; `peak_gib` is the most memory that torch
allocated in the counted steps. Importing SpecForge raises torch's recompile limit for the whole process.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import write_json
from draftcache.tools.bench.parts.block_cases import BLOCK_CASES, PEER_ANCHORS
from draftcache.tools.bench.parts.peer_blocks import dspark_step
from draftcache.tools.bench.parts.peer_wheels import WHEELS, automodel_modules, unpacked_wheels
from draftcache.tools.result_rows import report, result_row, some_of

UNITS = {"tok_s": "tok/s", "peak_gib": "GiB", "anchor_s": "anchors/s", "anchors": "anchors"}
WARM_UP, TIMED = 2, 3

Metrics = dict[str, float]
Step = Callable[[], Any]


@dataclass(frozen=True)
class PeerShape:
    """The draft's shape, the verifier's vocabulary, and the number of unroll steps; by default for the 30B verifier."""

    hidden: int = 2688
    intermediate: int = 8064
    heads: int = 32
    kv_heads: int = 2
    head_dim: int = 128
    vocab: int = 131_072
    draft_vocab: int = 32_000
    steps: int = 6


def main() -> None:
    """Time the chosen projects and report the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer-wheels", type=Path, required=True, metavar="DIRECTORY", help="holds the wheels")
    parser.add_argument("--peers", type=some_of(WHEELS), default=",".join(WHEELS), help="(%(default)s)")
    parser.add_argument("--length", type=int, default=32_768, help="tokens of the conversation (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("expected a CUDA device, found none; this benchmark measures one")
    name, rows = torch.cuda.get_device_name(), []
    device = torch.device("cuda")
    for case, metrics in peer_cases(device, arguments.length, arguments.peer_wheels, peers=arguments.peers):
        rows += [result_row(case, metric, value, UNITS[metric], name) for metric, value in metrics.items()]
        if arguments.output:  # a run that is cut short leaves the results of its finished cases
            write_json(arguments.output, rows)
    report(rows, arguments.output)


def peer_cases(
    device: torch.device,
    length: int,
    wheels: Path,
    shape: PeerShape | None = None,
    peers: Sequence[str] = tuple(WHEELS),
) -> Iterator[tuple[str, Metrics]]:
    """Yield the cases of these projects, such as `specforge-32k` (named after `length`), with their metrics.

    The memory of one case is freed before the next. Raises InputError if a wheel is missing or no form of Automodel's
    input runs.
    """
    shape = shape or PeerShape()
    suffix = f"{length // 1024}k" if length >= 1024 else str(length)
    with unpacked_wheels(wheels, peers):
        if "specforge" in peers:
            yield f"specforge-{suffix}", _timed_case(lambda: specforge_step(shape, length, device), length, device)
        if "automodel" in peers:
            yield f"automodel-{suffix}", _fastest_automodel(shape, length, device)
        if "speculators" in peers:
            yield from speculators_cases(BLOCK_CASES["dspark-32k"].shape(), length, device)


def _fastest_automodel(shape: PeerShape, length: int, device: torch.device) -> Metrics:
    forms = {}
    for form in ("padded", "packed", "packed, compiled"):
        try:
            forms[form] = _timed_case(lambda form=form: automodel_step(shape, length, device, form), length, device)  # type: ignore[misc]
            print(f"automodel, {form}:", forms[form], flush=True)
        except RuntimeError as exc:  # a form that does not fit or compile is left out
            print(f"automodel, {form}: left out: {type(exc).__name__}: {str(exc)[:200]}", flush=True)
    if not forms:
        raise InputError("automodel: expected one of its input forms to run, found none that does")
    return max(forms.values(), key=lambda metrics: metrics["tok_s"])


def speculators_cases(shape: BlockShape, length: int, device: torch.device) -> Iterator[tuple[str, Metrics]]:
    """Yield the cases of speculators' DSpark draft of this shape, with more and more anchors until they don't fit."""
    name = f"peer-dspark-{length // 1024}k" if length >= 1024 else f"peer-dspark-{length}"
    anchors = min(PEER_ANCHORS, length)
    while anchors <= length:
        case = name if anchors <= PEER_ANCHORS else f"{name}-{anchors}-anchors"
        try:
            metrics = _timed_case(lambda count=anchors: dspark_step(shape, length, count, device), length, device)  # type: ignore[misc]
        except torch.cuda.OutOfMemoryError as exc:
            print(f"{case}: left out: {str(exc)[:200]}", flush=True)
            return
        yield case, metrics | {"anchor_s": metrics["tok_s"] * anchors / length, "anchors": anchors}
        anchors *= 2


def _timed_case(build: Callable[[], Step], length: int, device: torch.device) -> Metrics:
    """Return the speed and memory of the step that `build` makes. All of its memory is freed at the end."""
    try:
        step = build()
        for _ in range(WARM_UP):
            step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = statistics.median(_seconds(step, device) for _ in range(TIMED))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return {"tok_s": length / seconds, "peak_gib": peak / 2**30}
    finally:
        step = None  # type: ignore[assignment]  # frees the tensors it closes over before the cache is emptied
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _seconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def draft_ids(shape: PeerShape, device: torch.device) -> torch.Tensor:
    """Return the ascending ids [D] int64 of the draft vocabulary, spread over the verifier's vocabulary."""
    return torch.arange(shape.draft_vocab, device=device) * shape.vocab // shape.draft_vocab


def llama_settings(shape: PeerShape, length: int) -> dict[str, Any]:
    """Return the settings of a Llama configuration, from which both projects build their drafts."""
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "draft_vocab_size": shape.draft_vocab,
        "num_hidden_layers": 1,
        "max_position_embeddings": length + shape.steps,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }


def _random(device: torch.device, *size: int) -> torch.Tensor:
    return torch.randn(*size, device=device, dtype=torch.bfloat16)


def _inputs(shape: PeerShape, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, shape.vocab, (1, length), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def specforge_step(shape: PeerShape, length: int, device: torch.device) -> Step:
    """Return a function that runs one optimizer step of SpecForge's Eagle3 trainer."""
    config = importlib.import_module("transformers").LlamaConfig(**llama_settings(shape, length))
    draft_module = importlib.import_module("specforge.modeling.draft.llama3_eagle")
    with torch.device(device):
        draft = draft_module.LlamaForCausalLMEagle3(config, attention_backend="flex_attention").to(torch.bfloat16)
    draft.freeze_embedding()
    ids = draft_ids(shape, device)
    draft.t2d.zero_()[ids] = True
    draft.d2t.copy_(ids - torch.arange(len(ids), device=device))
    core = importlib.import_module("specforge.algorithms.eagle3.model").OnlineEagle3Model(
        draft, length=shape.steps, attention_backend="flex_attention"
    )
    optimizer = importlib.import_module("specforge.optimizer").BF16Optimizer(draft, lr=1e-4)
    head = torch.zeros(shape.vocab, shape.hidden, device=device, dtype=torch.bfloat16)
    # All other rows are zero, so every argmax is in the draft vocabulary, and all rows of the batch carry loss.
    head[ids] = _random(device, shape.draft_vocab, shape.hidden)
    inputs = _inputs(shape, length, device)
    aux, last = _random(device, 1, length, 3 * shape.hidden), _random(device, 1, length, shape.hidden)

    def step() -> None:
        losses = core(
            **inputs,
            target=None,
            loss_mask=torch.ones(1, length, 1, device=device, dtype=torch.long),
            hidden_states=aux,
            target_hidden_for_compact=last,
            target_head_weight=head,
        )[0]
        sum(0.8**k * loss for k, loss in enumerate(losses)).backward()
        optimizer.step()

    return step


def automodel_step(shape: PeerShape, length: int, device: torch.device, form: str) -> Step:
    """Return a function that runs one optimizer step of Automodel's Eagle3 trainer.

    `form` is "padded", "packed" or "packed, compiled".
    """
    draft_module, core_module = automodel_modules()
    config = importlib.import_module("transformers").LlamaConfig(**llama_settings(shape, length))
    config.attn_implementation = "flash_attention_2"  # the draft reads this attribute, not transformers' own
    with torch.device(device):
        draft = draft_module.LlamaEagle3DraftModel(config).to(torch.bfloat16)
    draft.freeze_embeddings()
    ids = draft_ids(shape, device)
    draft.set_vocab_mapping(ids)
    core = core_module.Eagle3TrainerModule(
        draft, selected_token_ids=ids, selected_token_mask=draft.t2d.clone(), ttt_steps=shape.steps
    )
    if form.endswith("compiled"):
        draft.compile()
    parameters = [parameter for parameter in core.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
    inputs = _inputs(shape, length, device)
    inputs["loss_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["position_mask"] = torch.ones(1, length, 1, device=device, dtype=torch.bool)
    inputs["aux_hidden_states"] = _random(device, 1, length, 3 * shape.hidden)
    inputs["target_probs"] = torch.softmax(_random(device, 1, length, shape.draft_vocab), dim=-1)
    if form.startswith("packed"):  # the pack is one document; `doc_remaining` would only cut the document's last rows
        inputs["position_ids"] = torch.arange(length, device=device)[None]
        inputs["seq_lens"] = torch.tensor([[length]], device=device)
        inputs["doc_remaining"] = torch.arange(length, 0, -1, device=device)[None] - 1

    def step() -> None:
        core(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
