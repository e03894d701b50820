"""The form in which engines load an Eagle3 draft: config.json and model.safetensors, classic or of speculators.

Engines do not report these mistakes. Tap ids in another engine's convention, or in a place where it does not look, cost
most of the acceptance. A missing lm_head falls back to the verifier's. A missing d2t maps draft id i to target id i. A
`sliding_window` without `layer_types` is full attention. So every field is written; `served_checks` looks for them all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.draft_train.drafts.protocol import CheckpointState, ServedForm
from draftcache.draft_train.drafts.served_parts import block_numbers, common_config, vocab_tensors
from draftcache.draft_train.drafts.serving_target import ServingTarget, VerifierFacts, eagle3_ids
from draftcache.draft_train.drafts.speculators_form import speculators_config
from draftcache.store.format.vocab_map import VocabMap

ENGINES = ("vllm", "sglang")


def tap_ids(state: CheckpointState, target: ServingTarget) -> list[int]:
    """Return the ids by which an engine knows the taps, which are block outputs as the store's manifest lists them.

    Raises InputError as `eagle3_ids` does, CheckpointError for taps that have no id.
    """
    return eagle3_ids(block_numbers(state), target, VerifierFacts.of_manifest(state.verifier))


def why_not_served(verifier: VerifierFacts, engine: str) -> str | None:
    """Return why `engine` can't serve an Eagle3 draft beside this verifier, and what to do; None where it can."""
    if engine != "sglang" or not verifier.nemotron_h:
        return None
    return (
        "SGLang's NemotronH hands its states to DFlash drafts and not to Eagle3 drafts (read up to 0.5.23); serve this "
        "one with vLLM, which takes --engine vllm, or train another with --draft dflash"
    )


def served_config(shape: Eagle3Shape, state: CheckpointState, target: ServingTarget, dtype: str) -> dict[str, Any]:
    """Return config.json of the exported draft. `dtype` is the name of its weights' dtype."""
    ids = tap_ids(state, target)
    config = common_config(shape, state, target, dtype) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "mlp_bias": False,
        "sliding_window": shape.sliding_window,
        "layer_types": ["sliding_attention" if shape.sliding_window else "full_attention"],
        "use_sliding_window": shape.sliding_window is not None,
        "norm_before_residual": False,
        # Eagle3.1. vLLM takes a field that is not written for False, and then refuses the norms' tensors, but carries
        # the un-normed state without a word.
        "fc_norm": shape.fc_norm,
        "norm_output": shape.norm_output,
        "eagle_aux_hidden_state_layer_ids": ids,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
        # The width of fc in taps, where an engine finds no eagle_config; it takes 3 without a word.
        "num_aux_hidden_states": len(ids),
    }
    if target.form == "classic":
        return config
    fields = {"architectures": ["Eagle3Speculator"], "norm_before_fc": False}
    tokens = draft_tokens(state.objective)
    return speculators_config(config, "eagle3", state, target, tokens=tokens, **fields)


def draft_tokens(objective: dict[str, Any]) -> int:
    """Return how many tokens per verify step the draft was trained for."""
    return int(objective["ttt_steps"])


def served_form(
    shape: Eagle3Shape,
    model: nn.Module,
    state: CheckpointState,
    vocab_map: VocabMap,
    *,
    target: ServingTarget,
    dtype: torch.dtype,
) -> ServedForm:
    """Return config.json, and the model's tensors in `dtype` with d2t int64 [D] and t2d bool [V] beside them.

    The layer's tensors are `midlayer.*`, and `layers.0.*` in the speculators form.
    """
    config = served_config(shape, state, target, str(dtype).removeprefix("torch."))
    tensors = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    if target.form == "speculators":
        tensors = {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
    return ServedForm(config, tensors | vocab_tensors(shape, vocab_map))
