"""Proof at start-up, on the machine and the weights that the job will use, that states are what their names say.

Five things are compared, each of which has gone wrong somewhere without anyone noticing:

- `tap_K`: the captured output of block K is `output_hidden_states[K + 1]` of the model's own code. Through our own
  forward the two drift apart with depth (another order of sums, now and then another expert), so there the tap has to
  be *nearest* to that state among the states of all blocks: rounding is orthogonal to what a block adds, so a tap that
  is off by one block is noticed at any depth.
- `final`: the final norm's output is the one of the model's own code.
- `logits`, `log_z`, `argmax`, `head`: the head on the final norm's output, with the scale and cap that were found,
  gives the model's logits; in nats, row by row (`head.prove_head`). Both sides are computed from one state.
- `block`: each block of our own forward adds to the residual stream what the model's block adds, both from the state of
  the model's own code. Differences do not accumulate, so a kernel that computes something else is noticed, and a deep
  model is not refused for rounding.
- `pieces`, where conversations are long enough for it to matter: a prefill in several pieces gives the states of a
  prefill in one piece, so the state is carried and not forgotten.

A difference is the median over rows of |found - expected| / |expected|: in a norm over all rows one row of massive
activations outweighs the others. The difference of a block is over all rows, as a kernel may be wrong in a few of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftcache.capture.verifier.head import HeadCall, float32_head, prove_head
from draftcache.capture.verifier.load import Verifier
from draftcache.store.common.errors import InputError

TOKENS = 256
"""Tokens that are read: two chunks of the scan, which the model's own code reads in well under a second."""

_SAME_CODE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
_BLOCK = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""The demo's verifier in bfloat16 is at 0.006 on a CPU; tokens whose experts' scores nearly tie may add to it."""
_DRIFT = 0.5
"""Limit for our own forward's taps and final state; 50 blocks of random weights drift by 0.04 in bfloat16 (0.07 to 0.13
in a norm over all rows), 12 blocks of trained weights by 0.01."""

_PIECE = 128
_PIECES = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""The limit is three times the drift where that is larger, as the drift says how far this model amplifies rounding. The
demo's verifier is at 0.14 where its SSM state is forgotten."""
_TIE = 1.02
"""A tap's distance may exceed the nearest by this factor: a block that adds next to nothing leaves the states of its
neighbours as near as its own."""


@torch.inference_mode()
def self_check(
    verifier: Verifier, layers: tuple[int, ...], token_ids: Tensor, *, in_pieces: bool = True
) -> dict[str, float]:
    """Compare the states of `token_ids` [L] int64 as the module's docstring says; returns the differences by name.

    Raises InputError where a difference is too large: for a model whose logits are not its head's output, scaled and
    capped, whose blocks do not return the residual stream, or whose states our forward does not compute.
    """
    token_ids = token_ids.to(verifier.device)
    states = verifier.forward(token_ids, layers)
    expected, final, logits, head_calls = _own_states(verifier, token_ids)
    blocks = verifier.body_forward.block_differences(token_ids[None])
    found = {f"tap_{layer}": _difference(states.taps[layer], expected[layer + 1]) for layer in layers}
    found["final"] = _difference(states.final, final)
    if blocks:
        found["block"] = float(np.max(blocks))  # NaN where any of them is NaN
    _require(verifier, found, blocks)
    _require_nearest(verifier, states.taps, expected)
    found |= prove_head(verifier.model, verifier.head, verifier.head_form, final, logits, head_calls)
    if in_pieces and token_ids.shape[0] > _PIECE:
        drift = max(found[f"tap_{layer}"] for layer in layers)
        found["pieces"] = _require_pieces(verifier, token_ids, states.taps, drift)
    return found


def _own_states(verifier: Verifier, token_ids: Tensor) -> tuple[list[Tensor], Tensor, Tensor, list[HeadCall]]:
    """States by the model's own code: hidden_states [L, H] each, the final norm's output [L, H] and logits [L, V].

    The logits are computed from the head's output in float32, and the calls of the head are the last item. The last
    entry of hidden_states is the last block's output, read by a hook; the model's own list ends with the final norm's
    output instead.
    """
    seen: dict[Any, Tensor] = {}  # a norm may be called before the blocks too; its last call counts

    def keep(module: Any, _inputs: Any, output: Any) -> None:
        seen[module] = (output[0] if isinstance(output, tuple) else output)[0]

    handles = [module.register_forward_hook(keep) for module in (verifier.blocks[-1], verifier.final_norm)]
    try:
        with float32_head(verifier.head) as calls:
            output = verifier.model(input_ids=token_ids[None], use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    last, final = seen[verifier.blocks[-1]], seen[verifier.final_norm]
    return [*(state[0] for state in output.hidden_states[:-1]), last], final, output.logits[0], calls


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
    if wrong:
        raise InputError(
            f"{type(verifier.model).__name__}: expected block outputs to equal output_hidden_states[i + 1] and the "
            f"final norm's output to be the model's within { {name: limits[name] for name in wrong} }, found "
            f"relative differences {wrong}; this model's conventions are not supported"
        )


def _require_nearest(verifier: Verifier, taps: dict[int, Tensor], expected: list[Tensor]) -> None:
    for layer, tap in taps.items():
        distances = [_difference(tap, state) for state in expected]
        nearest = min(range(len(distances)), key=distances.__getitem__)
        if not distances[layer + 1] <= _TIE * distances[nearest]:
            raise InputError(
                f"{type(verifier.model).__name__}: expected tap {layer} to be output_hidden_states[{layer + 1}], found "
                f"it nearer to [{nearest}] ({distances[nearest]:.3g} against {distances[layer + 1]:.3g}); this model's "
                "conventions are not supported"
            )


def _require_pieces(verifier: Verifier, token_ids: Tensor, whole: dict[int, Tensor], drift: float) -> float:
    """The largest difference of any tap [L, H] of `whole`, over the rows after the first piece. Raises InputError."""
    pieces = list(verifier.prefill(token_ids[None], tuple(whole), _PIECE))
    later = {layer: torch.cat([piece.taps[layer][0] for piece in pieces[1:]]) for layer in whole}
    found = float(np.max([_difference(later[layer], tap[_PIECE:]) for layer, tap in whole.items()]))
    limit = max(_PIECES[verifier.head.weight.dtype], 3 * drift)
    if not found <= limit:
        raise InputError(
            f"{type(verifier.model).__name__}: expected a prefill in pieces of {_PIECE} tokens to give the states of "
            f"one in one piece within {limit:.3g}, found {found:.3g}; forward {verifier.body_forward.name} does not "
            "carry this model's state with these versions: update them"
        )
    return found


def _difference(found: Tensor, expected: Tensor) -> float:
    """The median over rows of the relative difference, in float32; NaN where any row holds NaN."""
    rows = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-30)
    return float(rows.median())
