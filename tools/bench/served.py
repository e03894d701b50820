"""The 30B verifier's shape with an Eagle3 draft in a real vLLM: does it fit, and what does the draft cost per step?

`python -m draftcache.tools.bench.served --vllm PYTHON --work DIR [--output FILE]` starts vLLM with a draft of each
window and without a draft, all with random weights that vLLM makes itself (`load_format="dummy"`), and decodes one
sequence behind prompts of several lengths. PYTHON is an interpreter that has vLLM. The verifier needs one GPU of 80 GB;
`--shape small` is a small Llama, for a CPU. A draft with random weights proposes what is never accepted, so every
verify step makes one token, and times do not depend on the text.

- `step_ms@L` is the wall time of a verify step behind L tokens, or of a token in the case `plain`.
- `draft_ms@L` is the median time of the draft's proposals in it, between events on the GPU's stream. Where vLLM
  launches kernels one by one this is mostly the host's time, so `draft_kernel_ms@L` is the time of the kernels alone,
  by a profile of a few steps, and `step_kernel_ms@L` that of the whole step.
- `prefill_s@L` is the time to the first token.
- `kv_tokens` is how many tokens vLLM's KV cache holds, `draft_kv_bytes` what a token of the draft's takes there, and
  `draft_window` the window that the cache keeps for the draft, 0 for all of the text.
- `kv_groups` are the groups into which the cache's layers are split: each has a block table of its own, which the host
  keeps up in every step. One layer of another kind makes all groups as small as its own.
- `memory_gib` is the device's memory in use at the end.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.failures import describe_failure, exit_code_of
from draftcache.store.common.files import atomic_directory, write_json
from draftcache.tools.engine_check.engine import Engine, engine_versions
from draftcache.tools.result_rows import cpu_name, report, result_row

SCRIPT = Path(__file__).parent / "parts" / "served_engine.py"
PLAIN = "plain"


@dataclass(frozen=True)
class ServedShape:
    """A verifier, its draft, and the options with which vLLM is started."""

    layers: tuple[int, ...]
    draft_vocab: int
    draft: dict[str, Any]
    """Settings of `TrainConfig`."""
    options: dict[str, Any]


SHAPES = {
    "nemotron-30b": ServedShape(
        layers=(2, 26, 48),
        draft_vocab=32_000,
        draft={"intermediate_size": 8064, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128},
        options={"dtype": "bfloat16", "gpu_memory_utilization": 0.95, "max_num_batched_tokens": 8192},
    ),
    "small": ServedShape(
        layers=(1, 2, 4),
        draft_vocab=600,
        draft={"intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
        options={"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 8192},
    ),
}


def main() -> int:
    """Run the cases and report them. Returns 0, or the exit code of what stopped it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--vllm", required=True, metavar="PYTHON", help="interpreter that has vLLM")
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="finished starts in it are not repeated"
    )
    parser.add_argument("--shape", choices=list(SHAPES), default=next(iter(SHAPES)))
    parser.add_argument("--contexts", type=_numbers, default=[1024, 32_768, 131_072], metavar="L,L")
    parser.add_argument(
        "--cases", type=_cases, default="window-4096,window-full,plain", metavar="CASE,CASE",
        help="windows of the draft, and none: window-W, window-full, plain (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--output", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    try:
        return measure(arguments)
    except DraftcacheError as exc:
        print(describe_failure(exc), file=sys.stderr)
        return exit_code_of(exc)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _cases(text: str) -> dict[str, int | None]:
    """Parse names of cases, each to the draft's window, 0 for full attention; None without a draft.

    Raises argparse.ArgumentTypeError.
    """
    known = {PLAIN: None, "window-full": 0}
    found = {name: known.get(name, _window(name)) for name in text.split(",")}
    if wrong := [name for name, window in found.items() if window is None and name != PLAIN]:
        raise argparse.ArgumentTypeError(f"expected window-W, window-full or {PLAIN}, found {wrong[0]!r}")
    return found


def _window(name: str) -> int | None:
    number = name.removeprefix("window-")
    return int(number) if number != name and number.isdecimal() and int(number) else None


def measure(arguments: argparse.Namespace) -> int:
    """Start vLLM for each case. A case that fails is told, and the others go on."""
    versions = engine_versions(arguments.vllm)
    device = cpu_name() if versions["device"] == "cpu" else versions["device"]
    shape = SHAPES[arguments.shape]
    arguments.work.mkdir(parents=True, exist_ok=True)
    verifier, config = save_verifier_config(arguments.shape, arguments.work)
    length = max(arguments.contexts) + arguments.tokens + 64
    options = shape.options | {
        "load_format": "dummy", "max_model_len": length, "max_num_seqs": 4, "enable_prefix_caching": False,
        "disable_log_stats": False, "seed": 0,
    }  # fmt: skip
    engine = Engine(arguments.vllm, arguments.work, options, script=SCRIPT)
    rows, code = [], 0
    for case, window in arguments.cases.items():
        more: dict[str, Any] = {}
        if window is not None:
            draft = save_draft(shape, config, arguments.work, window, length)
            speculative = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": arguments.draft_tokens}
            more = {"speculative_config": speculative}
        request = {
            "model": str(verifier), "options": options | more, "contexts": arguments.contexts,
            "tokens": arguments.tokens, "draft_layer": config.num_hidden_layers,
        }  # fmt: skip
        try:
            found = engine.result_of(case, f"{arguments.shape}, {case}", request)
        except DraftcacheError as exc:
            print(f"{case}: {describe_failure(exc)}", file=sys.stderr, flush=True)
            code = exit_code_of(exc)
            continue
        name = f"{arguments.shape}-{case}"
        rows += [result_row(name, metric, value, unit, device) for metric, value, unit in metrics(found, versions)]
        if arguments.output is not None:
            write_json(arguments.output, rows)
    report(rows, arguments.output)
    return code


def metrics(found: dict[str, Any], versions: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Return metric, value and unit of each figure of one start."""
    made = [
        ("kv_tokens", found["kv_tokens"], f"tokens, {versions['engine']}"),
        ("memory_gib", found["memory_gib"], "GiB"),
        ("kv_groups", len(found["groups"]), "groups of layers"),
    ]
    for group in found["groups"]:
        if group["of_draft"]:
            made.append(
                ("draft_kv_bytes", group["page_bytes"] / group["block_tokens"], f"bytes/token, {group['spec']}")
            )
            made.append(("draft_window", group["window"] or 0, f"tokens, {group['spec']}"))
    for context, run in found["runs"].items():
        made += [(f"step_ms@{context}", run["step_ms"], "ms"), (f"prefill_s@{context}", run["prefill_s"], "s")]
        if run["draft_ms"] is not None:
            made.append((f"draft_ms@{context}", run["draft_ms"], "ms"))
        made += [(f"{metric}@{context}", value, "ms") for metric, value in (run["kernels"] or {}).items()]
    return made


def save_verifier_config(name: str, work: Path) -> tuple[Path, Any]:
    """Return the directory with the verifier's config.json, and the configuration."""
    if name == "small":
        from draftcache.tools.engine_check.subjects import llama_config

        config, architecture = llama_config(), "LlamaForCausalLM"
        config.max_position_embeddings = 262_144
    else:
        from draftcache.tools.bench.parts.verifier_shape import verifier_config

        config, architecture = verifier_config(), "NemotronHForCausalLM"
    config.architectures = [architecture]
    directory = work / f"{name}-verifier"
    config.save_pretrained(directory)
    return directory.absolute(), config


def save_draft(shape: ServedShape, verifier: Any, work: Path, window: int, length: int) -> Path:
    """Return the directory of an exported draft with random weights and this window; 0 is full attention."""
    import torch

    from draftcache.draft_train.config import TrainConfig
    from draftcache.draft_train.drafts.protocol import CheckpointState
    from draftcache.draft_train.drafts.registry import find_architecture
    from draftcache.draft_train.drafts.serving_target import ServingTarget
    from draftcache.draft_train.drafts.sizes import VerifierShape
    from draftcache.store.common.tensor_files import save_tensors
    from draftcache.store.format.manifest import Tap
    from draftcache.store.format.vocab_map import VocabMap

    output = (work / f"draft-{window}").absolute()
    if output.exists():
        return output
    config = TrainConfig(
        store="synthetic",
        output=Path("synthetic"),
        splits=("train",),
        sliding_window=window,
        ttt_steps=6,
        **shape.draft,
    )
    sizes = VerifierShape(
        hidden_size=verifier.hidden_size, taps=len(shape.layers), vocab_size=verifier.vocab_size,
        draft_vocab_size=shape.draft_vocab, rms_norm_eps=1e-5,
    )  # fmt: skip
    architecture = find_architecture("eagle3")
    draft = architecture.build(architecture.shape_for(config, sizes), torch.device("cpu"))
    torch.manual_seed(0)
    for value in draft.model.parameters():
        torch.nn.init.normal_(value, std=0.02)
    described = {
        "name": "verifier", "model_type": verifier.model_type, "layers": verifier.num_hidden_layers,
        "hidden_size": verifier.hidden_size, "vocab_size": verifier.vocab_size, "weights_hash": "",
        "max_position_embeddings": length, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    state = CheckpointState(
        architecture="eagle3", step=0, finished=True, objective=config.objective(), shape=draft.shape, store_hash="",
        draft_vocab_hash="", verifier=described, taps=[asdict(Tap(layer=layer)) for layer in shape.layers], metrics={},
    )  # fmt: skip
    words = VocabMap(target_ids=torch.arange(shape.draft_vocab).numpy(), vocab_size=verifier.vocab_size)
    target = ServingTarget(engine="vllm")
    form = draft.served_form(state, words, target=target, dtype=torch.bfloat16)
    with atomic_directory(output) as partial:
        save_tensors(partial / "model.safetensors", form.tensors, metadata={"format": "pt"})
        write_json(partial / "config.json", form.config)
    return output


if __name__ == "__main__":
    sys.exit(main())
