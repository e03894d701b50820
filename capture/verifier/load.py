"""Loading the frozen verifier: any Hugging Face causal LM whose blocks, final norm and head can be found.

Nothing here names a model class; `draftcache.capture.verifier.self_check` proves at start-up that the modules found are
the right ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from draftcache.capture.verifier.blocks import find_blocks, find_final_norm, model_class, text_body
from draftcache.capture.verifier.families import choose_forward
from draftcache.capture.verifier.forward import Forward, Piece
from draftcache.capture.verifier.head import choose_head_form
from draftcache.capture.verifier.identity import describe_parts
from draftcache.capture.verifier.norm import FinalNorm, measure_norm
from draftcache.capture.verifier.projection import vocabulary_sides
from draftcache.capture.verifier.quantization import quantisation_method, require_loadable, require_plain
from draftcache.capture.verifier.rope import pin_rope
from draftcache.capture.verifier.ssm_precision import mamba_mixers, stand_in_for_extension, torch_forms_on_the_cpu
from draftcache.capture.verifier.streaming import can_stream, streaming
from draftcache.capture.verifier.weights import require_all_weights, require_room
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import require_regular_files
from draftcache.store.format.head_form import IDENTITY, HeadForm


@dataclass(frozen=True)
class VerifierStates:
    """The states of one conversation in the model's dtype: taps [L, H] by block number, final norm's output [L, H]."""

    taps: dict[int, torch.Tensor]
    final: torch.Tensor


@dataclass(frozen=True)
class Verifier:
    """A loaded causal LM and the modules that capture reads. Implements `source.StateSource`."""

    model: Any
    body: Any
    blocks: nn.ModuleList
    embeddings: nn.Embedding
    """Of the blocks' width; the model's own, or folded with the projection behind it."""
    final_norm: nn.Module
    head: nn.Linear
    """What makes logits of the final norm's output; the model's own, or folded with the projection before it."""
    device: torch.device
    body_forward: Forward
    """Runs the body; `choose_forward` chose it."""
    head_form: HeadForm = IDENTITY
    """What makes logits of the head's output; `load_verifier` chose it, and the self-check proves it."""
    projected_head: nn.Linear | None = None
    """The model's own head where `head` is folded from it and the projection before it."""
    rope: str | None = None
    """What rotary embeddings that choose by the length of a call were pinned to; None where there are none."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.embeddings.weight.shape[1])

    @property
    def own_head(self) -> nn.Linear:
        """The head that the model's own code calls."""
        return self.head if self.projected_head is None else self.projected_head

    @property
    def head_size(self) -> int:
        """Width of the final norm's output, which the head reads; another than `hidden_size` in few models."""
        return int(self.head.in_features)

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return int(self.head.weight.shape[0])

    @cached_property
    def norm(self) -> FinalNorm:
        """What the final norm computes, and its effective weight, measured through the module."""
        return measure_norm(self.final_norm, self.model.config.get_text_config(), self.head_size)

    @property
    def rms_norm_eps(self) -> float:
        """Epsilon of the final norm."""
        return self.norm.eps

    @property
    def name(self) -> str:
        """The forward's name."""
        return self.body_forward.name

    @property
    def chunk_multiple(self) -> int:
        """The forward's own."""
        return self.body_forward.chunk_multiple

    def implementations(self) -> dict[str, str]:
        """The forward's own."""
        return self.body_forward.implementations()

    def describe(self, path: Path, *, full_hash: bool) -> dict[str, Any]:
        """`describe_verifier` of this verifier, which was loaded from `path`."""
        return describe_verifier(path, self, full_hash=full_hash)

    def forward(self, token_ids: torch.Tensor, layers: tuple[int, ...]) -> VerifierStates:
        """Run one conversation, `token_ids` [L] int64, in one piece, and keep the outputs of the blocks `layers`."""
        (piece,) = self.prefill(token_ids[None], layers, token_ids.shape[0])
        return VerifierStates(taps={layer: tap[0] for layer, tap in piece.taps.items()}, final=piece.final[0])

    def prefill(self, token_ids: torch.Tensor, layers: tuple[int, ...], chunk_tokens: int) -> Iterator[Piece]:
        """`Forward.prefill` of `token_ids` [B, L] int64 on any device, in pieces of at most `chunk_tokens` rows."""
        return self.body_forward.prefill(token_ids.to(self.device), layers, max(1, chunk_tokens))

    def states(
        self, token_ids: torch.Tensor, lengths: Sequence[int], layers: tuple[int, ...], chunk_tokens: int
    ) -> Iterator[Piece]:
        """`prefill`; a causal model needs no lengths, as nothing reads the padding behind them."""
        return self.prefill(token_ids, layers, chunk_tokens)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def load_config(path: Path, *, trust_remote_code: bool) -> Any:
    """Return a model directory's configuration, of its text part where it has several. Raises InputError."""
    _require_config(path)
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        return config.get_text_config()
    except Exception as exc:  # whatever a config's contents make a config class raise
        raise InputError(
            f"{path / 'config.json'}: expected the configuration of a language model, found one that could not be "
            f"loaded ({type(exc).__name__}: {exc}){_remedy(exc)}"
        ) from exc


def load_verifier(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    tensor_parallel: int = 1,
    max_model_len: int | None = None,
) -> Verifier:
    """Load a model directory, frozen, in evaluation mode, from safetensors only; to a GPU as `streaming` says.

    With `tensor_parallel` > 1 this process is one of that many ranks of a process group, each of which loads its part
    of the weights. `max_model_len` is the length that the model will be served with, `max_position_embeddings` where it
    is None: some rotary embeddings depend on it. Raises InputError where the directory holds no such model, or one that
    does not fit on the GPU.
    """
    _require_config(path)
    if tensor_parallel == 1 and device.type == "cuda":  # a rank's part of the weights is known only after loading
        require_room(path, device, dtype)
    stand_in_for_extension()
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
        require_loadable(path, config)
        # Some quantised weights can't be moved, so they are loaded to where they stay.
        placed = device.type == "cuda" and tensor_parallel == 1 and quantisation_method(config) is not None
        streamed = tensor_parallel == 1 and not placed and can_stream(device)
        with streaming(device) if streamed else nullcontext():
            model, report = model_class(config).from_pretrained(
                path,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported with all other differences, and refused below
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
                **({"device_map": {"": str(device)}} if placed or streamed else {}),
                **({} if tensor_parallel == 1 else _tensor_parallel_plan(path, tensor_parallel, trust_remote_code)),
            )
    except (MemoryError, torch.OutOfMemoryError, InputError):
        raise
    except Exception as exc:  # whatever a config's or a checkpoint's contents make a model class raise
        raise InputError(
            f"{path}: could not be loaded as a causal language model ({type(exc).__name__}: {exc}){_remedy(exc)}"
        ) from exc
    require_all_weights(path, report)
    if tensor_parallel == 1 and not placed:
        model.to(device)
    model.eval().requires_grad_(False)
    torch_forms_on_the_cpu(mamba_mixers(model))
    found = find_modules(model, device)
    rope = pin_rope(model, max_model_len)
    form = choose_head_form(model, found.final_norm, found.head, found.own_head)
    return replace(found, rope=rope, head_form=form)


def _remedy(exc: Exception) -> str:
    """What to do about an error of loading, where transformers names an argument that is a flag here."""
    if "trust_remote_code" in str(exc):
        return ". Pass --trust-remote-code to run the code that the checkpoint brings along"
    return ""


def _require_config(path: Path) -> None:
    """Raise InputError where a model directory has no config.json, which those of GGUF files lack, or has pipes."""
    require_regular_files(path)
    if (path / "config.json").is_file():
        return
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() else [path] if path.suffix == ".gguf" else []
    if ggufs:
        raise InputError(
            f"{ggufs[0]}: expected a model directory with config.json and safetensors, found a GGUF file; convert it "
            f"once: with `pip install gguf`, AutoModelForCausalLM.from_pretrained({str(ggufs[0].parent)!r}, "
            f"gguf_file={ggufs[0].name!r}), then `model.hf_quantizer = None`, `del model.config.quantization_config`, "
            "`model.save_pretrained(DIRECTORY)`, and the same with AutoTokenizer"
        )
    raise InputError(f"{path}: expected a model directory, found no config.json")


def _tensor_parallel_plan(path: Path, ranks: int, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the model class's own plan; embeddings and head, read by capture, stay whole.

    Raises InputError for a model class without a plan.
    """
    try:
        from transformers.distributed import DistributedConfig

        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        plan = config.get_text_config().base_model_tp_plan
        if not plan or "tp_size" not in DistributedConfig.__dataclass_fields__:
            raise AttributeError("base_model_tp_plan")
    except (ImportError, AttributeError) as exc:
        raise InputError(
            f"{path}: expected a tensor-parallel plan for --tensor-parallel {ranks}, found none for this model in "
            f"transformers {transformers.__version__}; a newer one may have it (NemotronH has one in 5.23)"
        ) from exc
    names = {"lm_head", "model.embed_tokens"} if "embeddings" not in plan else {"lm_head", "model.embeddings"}
    return {"distributed_config": DistributedConfig(tp_size=ranks, tp_plan=dict.fromkeys(names, "replicate"))}


def find_modules(model: Any, device: torch.device) -> Verifier:
    """Find blocks, embeddings, final norm and head of a causal LM. Raises InputError naming what is missing."""
    holder, blocks = find_blocks(model)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embeddings, nn.Embedding):
        raise InputError(
            f"{type(model).__name__}: expected a linear head and an embedding table, "
            f"found {type(head).__name__} and {type(embeddings).__name__}"
        )
    require_plain("its embeddings", embeddings)
    require_plain("its head", head)
    body = text_body(model, holder)
    sides = vocabulary_sides(model, blocks, embeddings, head)
    final_norm = find_final_norm(model, holder, sides.reader)
    return Verifier(
        model=model,
        body=body,
        blocks=blocks,
        embeddings=sides.embeddings,
        final_norm=final_norm,
        head=sides.head,
        projected_head=None if sides.head is head else head,
        device=device,
        body_forward=choose_forward(model, body, blocks, final_norm),
    )


def describe_verifier(path: Path, verifier: Verifier, *, full_hash: bool = False) -> dict[str, Any]:
    """For the manifest: the verifier's identity, and the shapes and ids that training and export need.

    With `full_hash` every byte of the weight files is hashed too, beside the fingerprint of samples.
    """
    return describe_parts(
        path,
        verifier.model.config.get_text_config(),
        architecture=type(verifier.model).__name__,
        layers=len(verifier.blocks),
        hidden_size=verifier.hidden_size,
        head=verifier.head,
        norm=verifier.norm,
        head_form=verifier.head_form,
        full_hash=full_hash,
    ) | ({"rope": verifier.rope} if verifier.rope else {})
