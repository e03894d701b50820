"""NemotronH's body over a loaded model's own weights, a few times faster than the model's own code.

The blocks run one after the other: fused norms, convolution, routing and sums (`draftcache.capture.kernels`) around the
libraries' matrix products, flash attention and mamba-ssm's scan. The steps, and where their results are rounded, are
those of transformers' NemotronH. The norm of its newest version, which multiplies by the weight in float32, is used
with all versions. A test compares the two codes, in one piece and in several, on trained weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from draftcache.capture.kernels.attention import KeyValues, causal_attention
from draftcache.capture.kernels.causal_conv import causal_conv_silu
from draftcache.capture.kernels.experts import combine, dispatch, grouped_linear, relu_squared_, route
from draftcache.capture.kernels.norms import add_rms_norm, gated_group_norm
from draftcache.capture.kernels.state_space import chunk_scan
from draftcache.capture.verifier.flops import Flops
from draftcache.capture.verifier.forward import Piece
from draftcache.capture.verifier.nemotron.flops import nemotron_flops
from draftcache.capture.verifier.quantization import is_quantised
from draftcache.capture.verifier.ssm_precision import scan_function
from draftcache.store.common.errors import InputError
from draftcache.store.common.products import float32_product

_BLOCK_TYPES = {"linear_attention", "mamba", "full_attention", "attention", "moe", "mlp"}


@dataclass
class MambaState:
    """The state that one Mamba block carries from piece to piece; None before the first piece."""

    conv: Tensor | None = None
    """[B, K - 1, C]: the convolution's last inputs."""
    ssm: Tensor | None = None
    """[B, heads, head_dim, N] float32: the scan's state."""


@dataclass
class Carried:
    """States of all blocks by block number; a forward in one piece carries nothing."""

    capacity: int
    """Tokens of the whole conversation, for which attention blocks allocate keys and values."""
    mamba: dict[int, MambaState] = field(default_factory=dict)
    attention: dict[int, KeyValues] = field(default_factory=dict)


class NemotronForward:
    """The forward of NemotronH models; the module's docstring describes it.

    Implements `draftcache.capture.verifier.forward.FamilyForward`.
    """

    name = "draftcache"

    def __init__(self, model: Any) -> None:
        self._body = model.base_model
        self._blocks: list[Callable[[Tensor, Carried | None], Tensor]] = [
            self._block(number, block) for number, block in enumerate(self._body.layers)
        ]

    @staticmethod
    def supports(model: Any) -> str | None:
        config = model.config
        if getattr(config, "model_type", "") != "nemotron_h" or not hasattr(model.base_model, "layers"):
            return f"{type(model).__name__} is no NemotronH of transformers"
        if is_quantised(model):
            return f"{type(model).__name__} has quantised weights"
        kinds = {block.block_type for block in model.base_model.layers}
        checks = {
            f"block types {sorted(kinds)}": kinds <= _BLOCK_TYPES,
            f"mlp_hidden_act {config.mlp_hidden_act}": config.mlp_hidden_act == "relu2",
            f"mamba_hidden_act {config.mamba_hidden_act}": config.mamba_hidden_act == "silu",
            f"n_group {config.n_group}": config.n_group == 1 or "moe" not in kinds,
        }
        return next((f"its {name} is not handled" for name, holds in checks.items() if not holds), None)

    @classmethod
    def of(cls, model: Any, body: Any, blocks: nn.ModuleList, final_norm: nn.Module, reason: str) -> Self:
        return cls(model)

    @staticmethod
    def flops(config: Mapping[str, Any]) -> Flops | None:
        return nemotron_flops(config)

    @property
    def chunk_multiple(self) -> int:
        return next((int(block.mixer.chunk_size) for block in self._body.layers if hasattr(block.mixer, "A_log")), 1)

    def implementations(self) -> dict[str, str]:
        weight = self._body.embeddings.weight
        if weight.is_cuda and weight.dtype == torch.bfloat16:
            return {"attention": "sdpa: cudnn or flash", "experts": "grouped_mm"}
        return {"attention": "sdpa with a mask", "experts": "one after the other"}

    @torch.inference_mode()
    def prefill(self, token_ids: Tensor, layers: tuple[int, ...], chunk_tokens: int) -> Iterator[Piece]:
        length = token_ids.shape[1]
        carried = Carried(capacity=length) if length > chunk_tokens else None
        for first in range(0, length, chunk_tokens):
            yield self._piece(token_ids[:, first : first + chunk_tokens], layers, first, carried)

    def _piece(self, token_ids: Tensor, layers: tuple[int, ...], first: int, carried: Carried | None) -> Piece:
        residual = self._body.embeddings(token_ids)
        update: Tensor | None = None
        taps: dict[int, Tensor] = {}
        for number, block in enumerate(self._body.layers):
            residual, normed = add_rms_norm(residual, update, block.norm.weight, block.norm.variance_epsilon)
            if number - 1 in layers:
                taps[number - 1] = residual
            update = self._blocks[number](normed, carried)
        norm = self._body.norm_f
        residual, final = add_rms_norm(residual, update, norm.weight, norm.variance_epsilon)
        if len(self._blocks) - 1 in layers:
            taps[len(self._blocks) - 1] = residual
        return Piece(first=first, taps=taps, final=final)

    @torch.inference_mode()
    def block_differences(self, token_ids: Tensor) -> list[float]:
        """The norms are over all rows.

        The model's own code runs, and every block of ours starts from the state that entered the model's block, so
        that differences do not accumulate.
        """
        found: list[float] = []
        states: list[Tensor] = []

        def compare(number: int, output: Any) -> None:
            block = self._body.layers[number]
            theirs = (output[0] if isinstance(output, tuple) else output).float()
            _, normed = add_rms_norm(states.pop(), None, block.norm.weight, block.norm.variance_epsilon)
            ours = self._blocks[number](normed, None).float()
            found.append(float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30)))

        handles = []
        for number, block in enumerate(self._body.layers):
            handles.append(block.norm.register_forward_pre_hook(lambda _module, inputs: states.append(inputs[0])))
            handles.append(
                block.mixer.register_forward_hook(lambda _m, _i, output, number=number: compare(number, output))
            )
        try:
            self._body(input_ids=token_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _block(self, number: int, block: Any) -> Callable[[Tensor, Carried | None], Tensor]:
        mixer = block.mixer
        if hasattr(mixer, "A_log"):
            return _Mamba(number, mixer)
        if hasattr(mixer, "q_proj"):
            return _Attention(number, mixer)
        if hasattr(mixer, "experts"):
            return _Experts(mixer)
        return lambda rows, _carried: _mlp(mixer, rows)


class _Mamba:
    def __init__(self, number: int, mixer: Any) -> None:
        self._number, self._mixer = number, mixer
        self._scan = scan_function(mixer) if mixer.A_log.is_cuda else chunk_scan

    def __call__(self, rows: Tensor, carried: Carried | None) -> Tensor:
        mixer = self._mixer
        batch, length, _ = rows.shape
        gate, mixed, dt = mixer.in_proj(rows).split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1)
        state = None if carried is None else carried.mamba.setdefault(self._number, MambaState())
        before = None if state is None else state.conv
        if state is not None:
            state.conv = _last_rows(mixed, before, mixer.conv_kernel_size - 1)
        mixed = causal_conv_silu(mixed, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, before)
        inner, groups = mixer.n_groups * mixer.ssm_state_size, mixer.n_groups
        x, b, c = torch.split(mixed, [mixer.intermediate_size, inner, inner], dim=-1)
        result: Any = self._scan(
            x.view(batch, length, mixer.num_heads, mixer.head_dim),
            # The scan of plain torch adds the bias and takes the softplus in dt's dtype, the kernels in float32.
            dt if dt.is_cuda else dt.float(),
            -torch.exp(mixer.A_log.float()),
            b.view(batch, length, groups, mixer.ssm_state_size),
            c.view(batch, length, groups, mixer.ssm_state_size),
            chunk_size=mixer.chunk_size,
            D=mixer.D,
            z=None,
            return_final_states=state is not None,
            dt_bias=mixer.dt_bias,
            dt_softplus=True,
            initial_states=None if state is None else state.ssm,
            dt_limit=mixer.time_step_limit,
        )
        if state is not None:
            result, state.ssm = result
        # The scan of plain torch returns a slice, which is not contiguous, where it padded the last chunk.
        values = result.reshape(batch, length, -1).to(rows.dtype).contiguous()
        norm = mixer.norm
        values = gated_group_norm(values, gate, norm.weight, norm.variance_epsilon, norm.group_size)
        return mixer.out_proj(values)  # type: ignore[no-any-return]


class _Attention:
    def __init__(self, number: int, mixer: Any) -> None:
        self._number, self._mixer = number, mixer

    def __call__(self, rows: Tensor, carried: Carried | None) -> Tensor:
        mixer = self._mixer
        shape = (*rows.shape[:2], -1, mixer.head_dim)
        queries, keys, values = (
            project(rows).view(shape).transpose(1, 2) for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        if carried is not None:
            held = carried.attention.setdefault(self._number, KeyValues(carried.capacity))
            keys, values = held.append(keys, values)
        attended = causal_attention(queries, keys, values, mixer.scaling)
        return mixer.o_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _Experts:
    def __init__(self, mixer: Any) -> None:
        self._mixer = mixer
        gate = mixer.gate
        self._bias = gate.e_score_correction_bias.detach().float()
        self._router = _narrowest(gate.weight)
        self._up, self._down, self._group = _local_experts(mixer.experts.up_proj, mixer.experts.down_proj)

    def __call__(self, rows: Tensor, carried: Carried | None) -> Tensor:
        mixer, gate = self._mixer, self._mixer.gate
        flat = rows.flatten(0, 1)
        ids, weights = route(
            _router_logits(flat, self._router), self._bias, gate.top_k,
            scaling=gate.routed_scaling_factor, normalise=gate.norm_topk_prob,
        )  # fmt: skip
        pairs = dispatch(ids, gate.num_experts)
        latent = mixer.fc1_latent_proj(flat)
        hidden = relu_squared_(grouped_linear(latent[pairs.tokens], self._up, pairs.ends))
        expert_rows = grouped_linear(hidden, self._down, pairs.ends)
        del hidden
        if isinstance(mixer.fc2_latent_proj, nn.Identity) and self._group is None:
            return combine(expert_rows, weights, pairs.pair_rows, _mlp(mixer.shared_experts, flat)).view_as(rows)
        routed = combine(expert_rows, weights, pairs.pair_rows, torch.zeros_like(latent))
        if self._group is not None:
            dist.all_reduce(routed, group=self._group)
        return torch.add(mixer.fc2_latent_proj(routed), _mlp(mixer.shared_experts, flat)).view_as(rows)


def _local_experts(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, dist.ProcessGroup | None]:
    """The rank's part of the experts' weights, and the group of ranks to sum over; None where they are whole."""
    if not isinstance(up, DTensor) or not isinstance(down, DTensor):
        return up, down, None
    if not (up.placements == (Shard(1),) and down.placements == (Shard(2),)):
        raise InputError(
            f"experts: expected a plan that splits their width (up_proj by Shard(1), down_proj by Shard(2)), found "
            f"{up.placements} and {down.placements}; this version of transformers is not supported for "
            "--tensor-parallel"
        )
    return up.to_local().contiguous(), down.to_local().contiguous(), up.device_mesh.get_group()


def _mlp(mlp: Any, rows: Tensor) -> Tensor:
    return mlp.down_proj(relu_squared_(mlp.up_proj(rows)))  # type: ignore[no-any-return]


def _narrowest(weight: Tensor) -> Tensor:
    """The router's weights, in bfloat16 where that holds the same numbers.

    transformers 5.24 widens them to float32 as it loads them.
    """
    narrow = weight.detach().to(torch.bfloat16)
    return narrow if not isinstance(weight, DTensor) and torch.equal(narrow.to(weight.dtype), weight) else weight


def _router_logits(rows: Tensor, weight: Tensor) -> Tensor:
    """Logits [N, E] float32: products of bfloat16 numbers are exact in it, so tensor cores may compute them."""
    return (
        nn.functional.linear(rows.float(), weight.float())
        if isinstance(weight, DTensor)
        else float32_product(rows, weight)
    )


def _last_rows(rows: Tensor, before: Tensor | None, count: int) -> Tensor:
    """The last `count` rows [B, count, C] of `before` and then `rows`; zeros where there are fewer."""
    if rows.shape[1] >= count:
        return rows[:, rows.shape[1] - count :].clone()
    earlier = rows.new_zeros(rows.shape[0], count, rows.shape[2]) if before is None else before
    return torch.cat([earlier, rows], 1)[:, -count:].clone()
