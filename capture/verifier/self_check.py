"""Proof at start-up, on the machine and the weights that the job will use, that states are what their names say.

Several things are compared, each of which has gone wrong somewhere without anyone noticing:

- `stream`: what the model's blocks return is the residual stream, [batch, tokens, hidden]: the same states as its
  `output_hidden_states`, or, where it gives none, the states that the final norm gets.
- `last_block`, where it is tapped: its output is what the final norm reads, or what the model reports last.
- `tap_K`: the captured output of block K is what block K of the model's own code returns. Through our own forward the
  two drift apart with depth (another order of sums, now and then another expert), so there the tap has to be *nearest*
  to that state among the states of all blocks: rounding is orthogonal to what a block adds, so a tap that is off by one
  block is noticed at any depth.
- `final`: the final norm's output is the one of the model's own code.
- `logits`, `log_z`, `argmax`, `head`: the head on the final norm's output, with the scale and cap that were found,
  gives the model's logits; in nats, row by row (`head.prove_head`). Both sides are computed from one state.
- `block`: each block of our own forward adds to the residual stream what the model's block adds, both from the state of
  the model's own code. Differences do not accumulate, so a kernel that computes something else is noticed, and a deep
  model is not refused for rounding.

A difference is the median over rows of |found - expected| / |expected|: in a norm over all rows one row of massive
activations outweighs the others. The difference of a block is over all rows, as a kernel may be wrong in a few of them.
`reading.py` proves how conversations may be read: side by side, and in pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from draftcache.capture.verifier.forward import block_state
from draftcache.capture.verifier.head import HeadCall, float32_head, prove_head
from draftcache.capture.verifier.load import Verifier
from draftcache.store.common.errors import InputError

TOKENS = 256
"""Tokens that are read: two chunks of the scan, which the model's own code reads in well under a second."""

_SAME_CODE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_BLOCK = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""The demo's verifier in bfloat16 is at 0.006 on a CPU; tokens whose experts' scores nearly tie may add to it."""
_DRIFT = 0.5
"""Limit for our own forward's taps and final state. In bfloat16 12 blocks of trained weights drift by 0.01; 50 blocks
of random weights that outweigh the embeddings amplify every rounding, and drift by 0.15 to 0.55."""

_TIE = 1.02
"""A tap's distance may exceed the nearest by this factor: a block that adds next to nothing leaves the states of its
neighbours as near as its own."""


@torch.inference_mode()
def self_check(verifier: Verifier, layers: tuple[int, ...], token_ids: Tensor) -> dict[str, float]:
    """Compare the states of `token_ids` [L] int64 as the module's docstring says; returns the differences by name.

    Raises InputError where a difference is too large: for a model whose logits are not its head's output, scaled and
    capped, whose blocks do not return the residual stream, or whose states our forward does not compute.
    """
    token_ids = token_ids.to(verifier.device)
    own = _OwnRun.of(verifier, token_ids)
    expected, final = [state[0] for state in own.states], own.normed[-1][1][0]
    states = verifier.forward(token_ids, layers)
    blocks = verifier.body_forward.block_differences(token_ids[None])
    found = {"stream": _stream_difference(own.states, own.reported, own.normed[-1][0])}
    if layers[-1] == len(verifier.blocks) - 1:
        found["last_block"] = own.last_block_difference()
    found |= {f"tap_{layer}": row_difference(states.taps[layer], expected[layer + 1]) for layer in layers}
    found["final"] = row_difference(states.final, final)
    if blocks:
        found["block"] = float(np.max(blocks))  # NaN where any of them is NaN
    _require(verifier, found, blocks)
    _require_nearest(verifier, states.taps, expected)
    found |= prove_head(verifier.model, verifier.head, verifier.head_form, final, own.logits[0], own.head_calls)
    return found


@dataclass
class _OwnRun:
    """What one call of the model's own code shows."""

    states: list[Tensor] = field(default_factory=list)
    """The state before all blocks and behind each, [1, L, H] where blocks return the residual stream."""
    normed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """What the final norm read and gave, for each of its calls."""
    beside: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """What every module of the body that is no part of a block read and gave."""
    reported: tuple[Tensor, ...] = ()
    """`output_hidden_states`; () for a model that has none."""
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    """[1, L, V], computed from the head's output in float32."""
    head_calls: list[HeadCall] = field(default_factory=list)

    @classmethod
    def of(cls, verifier: Verifier, token_ids: Tensor) -> _OwnRun:
        """Run `token_ids` [L]. Raises InputError for blocks that don't return one state per token each."""
        found = cls()

        def begin(_module: Any, inputs: Any, named: Any) -> None:
            found.states.append(inputs[0] if inputs else named["hidden_states"])

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            found.states.append(block_state(output))

        def keep_pair(pairs: list[tuple[Tensor, Tensor]]) -> Any:
            def hook(_module: Any, inputs: Any, output: Any) -> None:
                if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                    pairs.append((inputs[0], output))

            return hook

        handles = [block.register_forward_hook(keep) for block in verifier.blocks]
        handles.append(verifier.blocks[0].register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(verifier.final_norm.register_forward_hook(keep_pair(found.normed)))
        handles += [module.register_forward_hook(keep_pair(found.beside)) for module in _beside_blocks(verifier)]
        try:
            with float32_head(verifier.own_head) as found.head_calls:
                output = verifier.model(input_ids=token_ids[None], use_cache=False, output_hidden_states=True)
        finally:
            for handle in handles:
                handle.remove()
        found.reported, found.logits = tuple(output.hidden_states or ()), output.logits
        _require_states(verifier, found, (1, token_ids.shape[0], verifier.hidden_size))
        return found

    def last_block_difference(self) -> float:
        """How far the last block's output is from the nearest of what may vouch for it.

        That is what the final norm reads, or gives where it is the block's own; or, where the head has more layers,
        what is reported last, or what the body's own norm read when it made what is reported last.
        """
        last = self.reported[-1:]
        read = [read for read, made in self.beside if any(torch.equal(made, seen) for seen in last)]
        return _nearest(self.states[-1], [*self.normed[-1], *last, *read])


def _require_states(verifier: Verifier, found: _OwnRun, shape: tuple[int, ...]) -> None:
    states = found.states
    shapes = {tuple(state.shape) if isinstance(state, Tensor) else (type(state).__name__,) for state in states}
    wrong = sorted(map(str, shapes - {shape}))
    if wrong or len(states) != len(verifier.blocks) + 1:
        raise InputError(
            f"{type(verifier.model).__name__}: expected {len(verifier.blocks)} blocks that each return one state per "
            f"token, of shape {shape}, found {len(states) - 1} outputs, of the shapes {wrong or shape}; a model with "
            "several residual streams, or with blocks that run twice, has no state that an engine hands to a draft, so "
            "no layers of it can be captured"
        )
    if not found.normed:
        raise InputError(
            f"{type(verifier.model).__name__}: expected the final norm {type(verifier.final_norm).__name__} to run on "
            "text, found that it does not; this model's conventions are not supported"
        )


def _beside_blocks(verifier: Verifier) -> list[nn.Module]:
    """The modules of the body that are no part of a block."""
    inside = {id(module) for block in verifier.blocks for module in block.modules()}
    return [module for module in verifier.model.base_model.modules() if id(module) not in inside]


def _nearest(state: Tensor, candidates: list[Tensor]) -> float:
    """The least difference of a state [1, L, H] to candidates of as many values; NaN where there is none."""
    found = [
        row_difference(state[0], seen.view(state.shape)[0]) for seen in candidates if seen.numel() == state.numel()
    ]
    return float(np.min(found)) if found else float("nan")


def _stream_difference(states: list[Tensor], reported: tuple[Tensor, ...], before_norm: Tensor) -> float:
    """The largest difference of the states to those that the model reports, at the better of two conventions.

    Most models report the state before every block, some the state behind it. What a model reports last is behind its
    final norm.
    """
    if not reported or len(reported) < len(states) - 1:
        return _nearest(states[-1], [before_norm])
    by_convention = []
    for shift in (0, 1):
        pairs = zip(states[1:-1], reported[1 - shift :], strict=False)
        by_convention.append(float(np.max([0.0, *(row_difference(own[0], theirs[0]) for own, theirs in pairs)])))
    return float(np.nanmin(by_convention)) if not np.isnan(by_convention).all() else float("nan")


def _require(verifier: Verifier, found: dict[str, float], blocks: list[float]) -> None:
    dtype = verifier.head.weight.dtype
    same = _SAME_CODE[dtype]
    drift = _DRIFT if blocks else same
    limits = {name: drift if name.startswith("tap_") or name == "final" else same for name in found}
    limits["block"] = _BLOCK[dtype]
    wrong = {name: value for name, value in found.items() if not value <= limits[name]}
    if "block" in wrong:
        worst = [number for number, value in enumerate(blocks) if not value <= limits["block"]]
        raise InputError(
            f"{type(verifier.model).__name__}: expected forward {verifier.body_forward.name} to add in every block "
            f"what the model's own code adds, within {limits['block']}, found {wrong['block']:.3g}, and too much in "
            f"blocks {worst}; its kernels compute something else with these versions on this device: update them"
        )
    if set(wrong) == {"last_block"}:
        raise InputError(
            f"{type(verifier.model).__name__}: expected the output of the last block, {len(verifier.blocks) - 1}, to "
            f"be what the model's norm reads or what the model reports last, within {same}, found a relative "
            f"difference of {wrong['last_block']:.3g}: something else comes between; leave this block out of --layers"
        )
    if wrong:
        raise InputError(
            f"{type(verifier.model).__name__}: expected block outputs to equal the model's own hidden states and the "
            f"final norm's output to be the model's within { {name: limits[name] for name in wrong} }, found "
            f"relative differences {wrong}; this model's conventions are not supported"
        )


def _require_nearest(verifier: Verifier, taps: dict[int, Tensor], expected: list[Tensor]) -> None:
    for layer, tap in taps.items():
        distances = [row_difference(tap, state) for state in expected]
        nearest = min(range(len(distances)), key=distances.__getitem__)
        if not distances[layer + 1] <= _TIE * distances[nearest]:
            raise InputError(
                f"{type(verifier.model).__name__}: expected tap {layer} to be the output of block {layer}, found "
                f"it nearer to that of block {nearest - 1} ({distances[nearest]:.3g} against "
                f"{distances[layer + 1]:.3g}); this model's conventions are not supported"
            )


def row_difference(found: Tensor, expected: Tensor) -> float:
    """The median over rows of the relative difference, in float32; NaN where any row holds NaN."""
    rows = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-30)
    return float(rows.median())
