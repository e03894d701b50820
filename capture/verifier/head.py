"""The verifier's logits: its head's products in float32, then the scale and the cap that its own code applies.

Models scale their logits (Cohere, Granite, Falcon-H1), or the states before the head (MiniCPM), or bend them to a cap
(Gemma, nanochat), each by a number of its configuration. No model is named here. Every number of the configuration that
may be such a scale or cap is tried, and the form that gives the model's own logits is taken; the self-check proves it
on the job's data, in nats, row by row. A relative norm over the vocabulary would not do: few logits come near a cap,
and these few decide the distribution.

The model's own code is run with its head's output in float32 (`float32_head`): what it then scales and bends is not
rounded, so in bfloat16 too a wrong scale or cap is told apart by its value and not by a guess about rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from draftcache.store.common.errors import InputError
from draftcache.store.common.products import float32_product, scale_and_cap
from draftcache.store.format.head_form import IDENTITY, HeadForm

_TOP = 64
"""Largest logits of a row that are compared one by one; all others are compared through log Z."""
_TOKENS = 64
"""Tokens that are read to choose the form."""
_EXACT = (1e-3, 1e-5)
"""Limit of a difference where both sides are float32: nats, and a part of the row's largest logit for another order of
sums. Found on tiny models of seven families: 2e-6 nats at most."""
_ROUNDED = (0.25, 2.0**-8)
"""Limit where the model's own code rounded on the way: a logit of magnitude m is known to m / 256 in bfloat16, and a
product whose parts were added up in bfloat16 is off by more."""
_NAMES = re.compile(r"logit|lm_head|unembed|output_mult|mup|dim_model_base|cap")
_NOT_OF_THE_HEAD = re.compile(r"att|router|vision|audio|gate|expert")


def head_logits(final: Tensor, head: nn.Linear, form: HeadForm = IDENTITY) -> Tensor:
    """Logits [P, V] float32 of final-norm states [P, H]; bf16 logits at 16..32 would tie in steps of 0.125."""
    logits = float32_product(final, head.weight)
    if head.bias is not None:
        logits += head.bias.float()
    return scale_and_cap(logits, form.scale, form.cap)


@dataclass(frozen=True)
class HeadCall:
    """One call of a head by its model: the states that it read, and what it gave in the model's dtype."""

    head: nn.Linear
    """The model's own, which may read other states than those of the final norm."""
    inputs: Tensor
    """[L, H]."""
    output: Tensor
    """[L, V]."""


@contextmanager
def float32_head(head: nn.Linear) -> Iterator[list[HeadCall]]:
    """Within this context the head gives its output in float32 to its model; yields the calls, the last one last.

    A model that does not call its head as a module is left as it is, and the list stays empty.
    """
    calls: list[HeadCall] = []

    def widen(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not inputs or not isinstance(output, Tensor):
            return None
        rows = inputs[0].flatten(0, -2)
        calls.append(HeadCall(head, rows, output.flatten(0, -2)))
        return head_logits(rows, head).view(output.shape)

    handle = head.register_forward_hook(widen)
    try:
        yield calls
    finally:
        handle.remove()


def candidate_forms(config: Any) -> list[HeadForm]:
    """Every form that the numbers of a model's configuration, and of its text part, can mean; the identity first.

    A number v may multiply or divide. `dim_model_base` stands for its quotient with the hidden size.
    """
    scales: list[float] = [1.0]
    caps: list[float | None] = [None]
    for part in (config, config.get_text_config()):
        for name, value in _numbers(part):
            if "cap" in name:
                caps.append(value)
                continue
            if name == "dim_model_base":
                value /= float(part.hidden_size)
            scales += [value, 1 / value]
    return list(dict.fromkeys(HeadForm(scale, cap) for cap, scale in product(caps, scales)))


def _numbers(config: Any) -> Iterator[tuple[str, float]]:
    """Names and values of the configuration's numbers above 0 that may be about logits, properties included."""
    properties = {name for name in dir(type(config)) if isinstance(getattr(type(config), name, None), property)}
    for name in sorted({*vars(config), *properties}):
        if name.startswith("_") or not _NAMES.search(name) or _NOT_OF_THE_HEAD.search(name):
            continue
        value = getattr(config, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
            yield name, float(value)


@torch.inference_mode()
def choose_head_form(model: Any, final_norm: nn.Module, head: nn.Linear, own_head: nn.Linear) -> HeadForm:
    """The form of a loaded model's logits, found on 64 tokens by the model's own code; not a proof.

    `own_head` is the head that the model calls, from which `head` may be folded.
    A model whose configuration leaves no choice is not run.
    """
    forms = candidate_forms(model.config)
    if len(forms) == 1:
        return forms[0]
    finals: list[Tensor] = []
    handle = final_norm.register_forward_hook(lambda _module, _inputs, output: finals.append(output))
    token_ids = (
        997 * torch.arange(1, _TOKENS + 1, device=head.weight.device) % head.out_features
    )  # spread over the vocabulary
    try:
        with float32_head(own_head):
            logits = model(input_ids=token_ids[None], use_cache=False).logits
    finally:
        handle.remove()
    return find_head_form(model, head, finals[-1].flatten(0, -2), logits.flatten(0, -2))


def find_head_form(model: Any, head: nn.Linear, final: Tensor, logits: Tensor) -> HeadForm:
    """The candidate that comes nearest to the model's logits [L, V] of its final states [L, H].

    It is compared at the largest logits of each row, by its largest difference in nats; the first one among equals.
    """
    if final.shape[-1] != head.in_features:
        return IDENTITY
    top = logits.float().topk(min(_TOP, logits.shape[-1]), dim=-1)
    products = head_logits(final, head).gather(-1, top.indices)
    best, least = IDENTITY, math.inf
    for form in candidate_forms(model.config):
        found = float((scale_and_cap(products.clone(), form.scale, form.cap) - top.values).abs().max())
        if found < least:
            best, least = form, found
    return best


def prove_head(
    model: Any, head: nn.Linear, form: HeadForm, final: Tensor, logits: Tensor, calls: list[HeadCall]
) -> dict[str, float]:
    """Prove that `head_logits` with `form` gives the model's logits [L, V] of its final states [L, H].

    `logits` and `calls` come from the model's own code within `float32_head`. Compared in nats, in every row: the 64
    largest logits, log Z and the argmax (how far ours lies below our largest); and, as `head`, the head's own output
    with the product in float32. Returns the largest differences by name. Raises InputError, which names the nearest
    form, where one exceeds its limit or is NaN.
    """
    name = type(model).__name__
    if final.shape[-1] != head.in_features:
        raise InputError(
            f"{name}: expected a head that reads the final norm's {final.shape[-1]} channels, found one of "
            f"{head.in_features}; this model's head is not supported"
        )
    ours = head_logits(final, head, form)
    exact = logits.dtype == torch.float32 and (
        final.dtype == torch.float32 or (len(calls) > 0 and torch.equal(calls[-1].inputs.float(), final.float()))
    )
    pairs = {"logits": _differences(ours, logits, _EXACT if exact else _ROUNDED)}
    if calls:
        limit = _EXACT if calls[-1].output.dtype == torch.float32 else _ROUNDED
        products = head_logits(calls[-1].inputs, calls[-1].head)
        pairs["head"] = {"head": _differences(products, calls[-1].output, limit)["logits"]}
    found = {key: difference for group in pairs.values() for key, difference in group.items()}
    wrong = {key: f"{item.value:.3g} (limit {item.limit:.3g})" for key, item in found.items() if not item.fits}
    if wrong:
        best = find_head_form(model, head, final, logits)
        nearest = {key: f"{item.value:.3g}" for key, item in _differences(
            head_logits(final, head, best), logits, _EXACT).items()}  # fmt: skip
        raise InputError(
            f"{name}: expected logits that are cap * tanh(scale * (head(final norm) + bias) / cap), by {form}, found "
            f"differences of {wrong} nats; of the numbers in its configuration the nearest is {best} with {nearest}; "
            "this model's logits are not supported"
        )
    return {key: item.value for key, item in found.items()}


@dataclass(frozen=True)
class _Difference:
    """The difference of the row that is worst by its limit, and that row's limit."""

    value: float
    limit: float

    @property
    def fits(self) -> bool:
        return self.value <= self.limit  # no NaN is


def _differences(ours: Tensor, theirs: Tensor, limit: tuple[float, float]) -> dict[str, _Difference]:
    theirs = theirs.float()
    count = min(_TOP, theirs.shape[-1])
    their_top, our_top = theirs.topk(count, dim=-1), ours.topk(count, dim=-1).values
    limits = limit[0] + limit[1] * torch.maximum(our_top.abs().amax(-1), their_top.values.abs().amax(-1))
    at_theirs = ours.gather(-1, their_top.indices)
    rows = {
        "logits": torch.maximum((at_theirs - their_top.values).abs(), (our_top - their_top.values).abs()).amax(-1),
        "log_z": (torch.logsumexp(ours, -1) - torch.logsumexp(theirs, -1)).abs(),
        "argmax": our_top[:, 0] - at_theirs[:, 0],
    }
    worst = {name: int((values / limits).argmax()) for name, values in rows.items()}  # NaN counts as the largest
    return {name: _Difference(float(values[worst[name]]), float(limits[worst[name]])) for name, values in rows.items()}
