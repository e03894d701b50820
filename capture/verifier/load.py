"""The frozen verifier: any Hugging Face causal LM whose blocks, final norm and head can be found.

Nothing here names a model class. What was found is proved at start-up by `draftcache.capture.verifier.self_check`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from safetensors import safe_open
from torch import nn

from draftcache.capture.verifier.forward import Forward, Piece, PlainForward
from draftcache.capture.verifier.nemotron.forward import NemotronForward, unsupported
from draftcache.capture.verifier.ssm_precision import mamba_mixers, stand_in_for_extension, torch_forms_on_the_cpu
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import hash_json, read_json
from draftcache.store.common.products import float32_product

_SAMPLES_PER_FILE = 256
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class VerifierStates:
    """What one forward leaves: taps [L, H] by block number, and the final-norm output [L, H], model dtype."""

    taps: dict[int, torch.Tensor]
    final: torch.Tensor


@dataclass(frozen=True)
class Verifier:
    """A loaded causal LM and the modules that capture reads."""

    model: Any
    body: Any
    blocks: nn.ModuleList
    embeddings: nn.Embedding
    final_norm: nn.Module
    head: nn.Linear
    device: torch.device
    engine: Forward
    """What runs the body: see `choose_forward`."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.embeddings.weight.shape[1])

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return int(self.head.weight.shape[0])

    @property
    def rms_norm_eps(self) -> float:
        """Epsilon of the final norm."""
        for name in ("variance_epsilon", "eps"):
            if isinstance(value := getattr(self.final_norm, name, None), float):
                return value
        raise InputError(
            f"{type(self.final_norm).__name__}: expected an epsilon in `variance_epsilon` or `eps`, found neither"
        )

    def forward(self, token_ids: torch.Tensor, layers: tuple[int, ...]) -> VerifierStates:
        """Run one conversation, `token_ids` [L] int64, in one piece, and keep the outputs of the blocks `layers`."""
        (piece,) = self.prefill(token_ids[None], layers, token_ids.shape[0])
        return VerifierStates(taps={layer: tap[0] for layer, tap in piece.taps.items()}, final=piece.final[0])

    def prefill(self, token_ids: torch.Tensor, layers: tuple[int, ...], chunk_tokens: int) -> Iterator[Piece]:
        """Pieces of at most `chunk_tokens` rows of `token_ids` [B, L] int64, as `Forward.prefill` gives them."""
        return self.engine.prefill(token_ids.to(self.device), layers, max(1, chunk_tokens))


def head_logits(final: torch.Tensor, head: nn.Linear) -> torch.Tensor:
    """Logits [P, V] in float32: bf16 logits at 16..32 would tie in steps of 0.125."""
    logits = float32_product(final, head.weight)
    return logits if head.bias is None else logits + head.bias.float()


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" computes in bfloat16 on a GPU and in float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def load_verifier(
    path: Path, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool, shard: int = 1
) -> Verifier:
    """Load a model directory, frozen, in evaluation mode, from safetensors only. Raises InputError.

    With `shard` > 1 this is one of as many processes of a process group (see `draftcache.capture.job.tensor_parallel`),
    and each loads its part.
    """
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: expected a model directory, found no config.json")
    if shard == 1 and device.type == "cuda":  # what a plan divides is known when it is applied
        _require_room(path, device, dtype)
    stand_in_for_extension()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            **({} if shard == 1 else {"distributed_config": _sharding(path, shard, trust_remote_code)}),
        )
    except (OSError, ValueError, KeyError) as exc:
        raise InputError(f"{path}: could not be loaded as a causal language model ({exc})") from exc
    if shard == 1:
        model.to(device)
    model.eval().requires_grad_(False)
    torch_forms_on_the_cpu(mamba_mixers(model))
    return find_modules(model, device)


def _require_room(path: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError where the weights can't fit on the GPU, before minutes are spent on reading them."""
    needed = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  (no mapping)
        needed += dtype.itemsize * sum(math.prod(shape) for shape in shapes)  # as computed with, not as stored
    free, total = torch.cuda.mem_get_info(device)
    if needed > free:
        raise InputError(
            f"{path}: expected weights of at most the {free / 1e9:.1f} GB that are free of {total / 1e9:.1f} GB on "
            f"{device}, found {needed / 1e9:.1f} GB; use a larger GPU, or --shard N to split them over N of this node"
        )


def _sharding(path: Path, shard: int, trust_remote_code: bool) -> Any:
    """The model class's own tensor-parallel plan, but for embeddings and head, which capture reads whole."""
    try:
        from transformers.distributed import DistributedConfig

        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        plan = config.get_text_config().base_model_tp_plan
        if not plan or "tp_size" not in DistributedConfig.__dataclass_fields__:
            raise AttributeError("base_model_tp_plan")
    except (ImportError, AttributeError) as exc:
        raise InputError(
            f"{path}: expected a tensor-parallel plan for --shard {shard}, found none for this model in transformers "
            f"{transformers.__version__}; a newer one may have it (NemotronH has one in 5.23)"
        ) from exc
    names = {"lm_head", "model.embed_tokens"} if "embeddings" not in plan else {"lm_head", "model.embeddings"}
    return DistributedConfig(tp_size=shard, tp_plan=dict.fromkeys(names, "replicate"))


def find_modules(model: Any, device: torch.device) -> Verifier:
    """Find blocks, embeddings, final norm and head of a causal LM. Raises InputError naming what is missing."""
    body = model.base_model
    count = model.config.get_text_config().num_hidden_layers
    stacks = [
        (name, module)
        for name, module in body.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not stacks:
        raise InputError(f"{type(model).__name__}: expected a ModuleList of {count} blocks, found none")
    stack_name, blocks = min(stacks, key=lambda item: item[0].count("."))
    parent = body.get_submodule(stack_name.rpartition(".")[0])
    norms = [module for name, module in parent.named_children() if "norm" in name.lower() or name == "ln_f"]
    if len(norms) != 1:
        raise InputError(
            f"{type(model).__name__}: expected one final norm beside the blocks, "
            f"found {[type(module).__name__ for module in norms]}"
        )
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embeddings, nn.Embedding):
        raise InputError(
            f"{type(model).__name__}: expected a linear head and an embedding table, "
            f"found {type(head).__name__} and {type(embeddings).__name__}"
        )
    return Verifier(
        model=model,
        body=body,
        blocks=blocks,
        embeddings=embeddings,
        final_norm=norms[0],
        head=head,
        device=device,
        engine=choose_forward(model, blocks, norms[0]),
    )


def choose_forward(model: Any, blocks: nn.ModuleList, final_norm: nn.Module) -> Forward:
    """Our own forward where it handles the model, else the model's own code; `Forward.name` says which."""
    reason = unsupported(model)
    return NemotronForward(model) if reason is None else PlainForward(model.base_model, blocks, final_norm, reason)


def weights_fingerprint(path: Path) -> str:
    """xxh3-128 over names, sizes, headers and 256 evenly spaced 64 KiB samples of each safetensors file.

    Tells checkpoints apart without reading 63 GB: two fine-tunes of one model differ in every sampled block.
    """
    digest = xxhash.xxh3_128()
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: expected *.safetensors weights, found none")
    for item in files:
        size = item.stat().st_size
        digest.update(json.dumps([item.name, size]).encode())
        stride = max(_SAMPLE_BYTES, size // _SAMPLES_PER_FILE)
        with item.open("rb") as file:
            for offset in range(0, size, stride):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def describe_verifier(path: Path, verifier: Verifier) -> dict[str, Any]:
    """The verifier's identity and the shape facts that training and export need, for the manifest."""
    raw = read_json(path / "config.json")
    config = verifier.model.config.get_text_config()
    return {
        "name": path.resolve().name,
        "architecture": type(verifier.model).__name__,
        "model_type": str(config.model_type),
        "config_hash": hash_json(
            {key: raw[key] for key in raw if key not in ("transformers_version", "_name_or_path")}
        ),
        "weights_hash": weights_fingerprint(path),
        "layers": len(verifier.blocks),
        "hidden_size": verifier.hidden_size,
        "vocab_size": verifier.vocab_size,
        "rms_norm_eps": verifier.rms_norm_eps,
        "max_position_embeddings": int(getattr(config, "max_position_embeddings", 0)),
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
