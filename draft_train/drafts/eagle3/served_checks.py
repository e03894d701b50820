"""What is looked for in an Eagle3 draft that an engine is to serve, whoever exported it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from draftcache.draft_train.drafts.eagle3.served import why_not_served
from draftcache.draft_train.drafts.served_checks import head, required_tensors, shared_findings
from draftcache.draft_train.drafts.served_draft import Finding, ServedDraft, error, warning, whole_numbers
from draftcache.draft_train.drafts.served_parts import sglang_window
from draftcache.draft_train.drafts.serving_target import (
    SGLANG_DEEPSEEK_CHANGE,
    ServingTarget,
    eagle3_ids,
    sglang_adds_one,
    takes_last_block,
)
from draftcache.store.common.errors import InputError

IDS = "eagle_aux_hidden_state_layer_ids"
NESTED = f"eagle_config.{IDS}"
SERVED_AS = (
    "eagle3", "Eagle3Speculator", "Eagle3DraftModel", "LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM",
    "Eagle3Qwen3ForCausalLM", "Eagle3Qwen2_5vlForCausalLM", "Eagle3Qwen3vlForCausalLM", "Eagle3MiniMaxM2ForCausalLM",
    "Eagle3DeepseekV2ForCausalLM", "Eagle3DeepseekV3ForCausalLM",
)  # fmt: skip
"""Names of the architecture in vLLM's registry, in SpecForge and in speculators."""


def findings(served: ServedDraft) -> Iterator[Finding]:
    """Yield what is wrong with an Eagle3 draft."""
    if reason := why_not_served(served.verifier, served.target.engine):
        yield error("engine", "--engine", "an engine that serves this draft", served.target.engine, reason)
    yield from shared_findings(served)
    yield from _window_of_sglang(served)
    eagle = served.layer.get("eagle_config")
    eagle = eagle if isinstance(eagle, dict) else {}
    ids = None
    if eagle.get("use_aux_hidden_state") is not False:
        ids = whole_numbers((eagle if served.target.engine == "sglang" else served.config).get(IDS))
        yield from _places(served, eagle)
        if ids is not None:
            yield from _order(ids)
            yield from _meaning(served, ids)
            yield from _count(served, eagle, ids)
    yield from _norms(served, ids)
    yield from required_tensors(served, _expected_shapes(served, ids))
    yield from head(served, shared_is_usual=False)


def _window_of_sglang(served: ServedDraft) -> Iterator[Finding]:
    """SGLang takes an Eagle3 draft's window from its own command line, and attends to all positions otherwise."""
    window = served.layer.get("sliding_window")
    if served.target.engine == "sglang" and window and "sliding_attention" in (served.layer.get("layer_types") or ()):
        advice = "start the server with it: without it the draft attends to all positions, as it never did in training"
        yield warning(
            "window-by-command", "sliding_window", sglang_window(int(window)), "it in config.json only", advice
        )


def _places(served: ServedDraft, eagle: dict[str, Any]) -> Iterator[Finding]:
    """vLLM reads the ids at the top level, and its second model runner nowhere else; SGLang reads the nested ones."""
    top, nested = whole_numbers(served.config.get(IDS)), whole_numbers(eagle.get(IDS))
    silent = "without them the engine takes blocks 2, n//2 and n-3 without a word"
    if top is None and nested is None:
        yield error("aux-ids-missing", IDS, "the ids of the states that fc reads", "none", f"write them: {silent}")
    elif served.target.engine == "vllm" and top is None:
        advice = f"write them at the top level too: {silent} (its V2 model runner looks there only)"
        yield error("aux-ids-nested-only", IDS, f"the ids of {NESTED}", "none", advice)
    elif served.target.engine == "sglang" and nested is None:
        advice = f"write them there too: {silent} (SGLang looks there only)"
        yield error("aux-ids-top-level-only", NESTED, f"the ids of {IDS}", "none", advice)
    elif top is not None and nested is not None and top != nested:
        advice = "write the same ids in both places"
        yield error("aux-ids-disagree", NESTED, f"the ids {top} of {IDS}", nested, advice)


def _order(ids: list[int]) -> Iterator[Finding]:
    if ids != sorted(set(ids)):
        advice = "engines hand over the states in ascending order, each once: order fc's columns so, and the ids"
        yield error("aux-ids-unsorted", IDS, "ascending, distinct ids", ids, advice)


def _meaning(served: ServedDraft, ids: list[int]) -> Iterator[Finding]:
    """Whether the ids name the states that the draft was trained on, as far as anything tells."""
    target, verifier, layers = served.target, served.verifier, served.verifier.layers
    adds = target.engine == "sglang" and sglang_adds_one(verifier, target)
    if adds is None:
        advice = f"name one by --engine-version: {SGLANG_DEEPSEEK_CHANGE} changed what ids mean beside this verifier"
        yield warning("engine-version", "--engine-version", "a version of SGLang", "none", advice)
        return
    shifted = bool(adds) or (target.engine == "sglang" and ids[0] == 1)
    blocks = [number if shifted else number - 1 for number in ids]
    said = "the draft reads other states than it was trained on, and most of its acceptance is lost"
    if served.blocks is not None:
        try:
            wanted = eagle3_ids(served.blocks, target, verifier)
        except InputError as exc:
            yield error("aux-ids-off-by-one", IDS, f"ids of the blocks {served.blocks}", ids, str(exc))
            return
        if wanted != ids:
            expected = f"{wanted}, {target.engine}'s ids of the outputs of blocks {served.blocks}"
            yield error("aux-ids-off-by-one", IDS, expected, ids, f"export for this engine: {said}")
    elif (guess := _looks_shifted(ids, target, layers)) is not None:
        advice = f"look in what the draft was trained with: if these are another engine's ids, {said}"
        yield warning("aux-ids-off-by-one", IDS, f"ids such as {guess}", ids, advice)
    if layers is None:
        return
    blocks = served.blocks or blocks
    if min(blocks) < -1 or max(blocks) >= layers:
        advice = "an engine never hands that state over; this is a draft of a deeper verifier, or the ids are shifted"
        yield error("aux-ids-past-the-end", IDS, f"ids of the verifier's {layers} blocks", ids, advice)
    elif max(blocks) == layers - 1 and not takes_last_block(verifier, target):
        advice = "SGLang is not known to hand it over: serve the draft with vLLM, or train it on another block"
        yield error("aux-ids-last-block", IDS, f"outputs of blocks before the last, {layers - 1}", ids, advice)


def _looks_shifted(ids: list[int], target: ServingTarget, layers: int | None) -> list[int] | None:
    """Return what ids of somebody else's draft look one away from, None where they do not."""
    usual = None if layers is None else [2, layers // 2, layers - 3]
    less = None if usual is None else [number - 1 for number in usual]
    if target.engine == "vllm":
        if ids == less:
            return usual
        return [number + 1 for number in ids] if usual is None and ids[0] in (0, 1) else None
    return less if ids == usual else None


def _count(served: ServedDraft, eagle: dict[str, Any], ids: list[int]) -> Iterator[Finding]:
    """vLLM takes the width of fc from num_aux_hidden_states, else from the nested ids, else for three states."""
    named, nested = served.layer.get("num_aux_hidden_states"), whole_numbers(eagle.get(IDS))
    width = named if named is not None else len(nested) if nested else 3
    if width != len(ids):
        advice = "write num_aux_hidden_states: engines make fc as wide as it says"
        yield error("aux-ids-count", "num_aux_hidden_states", f"{len(ids)}, as there are ids", width, advice)


def _norms(served: ServedDraft, ids: list[int] | None) -> Iterator[Finding]:
    """Which norms run is a field each, whose default differs from form to form."""
    name = "norm_before_residual"
    if not isinstance(served.config.get(name), bool):
        advice = "write it: vLLM takes a missing one for false in the classic form, for true in the speculators form"
        level = error if served.speculators else warning
        yield level(name.replace("_", "-"), name, "true or false", served.config.get(name), advice)
    for name in ("fc_norm", "norm_output"):
        value = served.config.get(name)
        if value is not None and not isinstance(value, bool):
            yield error("norms", name, "true or false", value, "write which norms run")
    if served.ours("engine") is not None and served.config.get("norm_output") is None:
        yield error("norms", "norm_output", "true or false", None, "write it: a missing one is taken for false")
    taps = range(len(ids or ())) if served.config.get("fc_norm") is True else ()
    expected = [f"fc_norm.{number}.weight" for number in taps]
    found = sorted(key for key in served.tensors if key.startswith("fc_norm."))
    if served.tensors and found != sorted(expected):
        advice = "let fc_norm say whether the taps' norms are there, with one for each id"
        yield error("norms", "fc_norm", f"norms of the taps {expected}", found, advice)


def _expected_shapes(served: ServedDraft, ids: list[int] | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that an engine loads, by name, as far as config.json tells them."""
    layer = served.layer
    hidden = layer.get("hidden_size")
    if not isinstance(hidden, int):
        return {}
    source = served.config.get("target_hidden_size") or hidden
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (hidden,)}
    if ids is not None:
        shapes["fc.weight"] = (hidden, source * len(ids))
    elif "fc.weight" not in served.tensors:
        shapes["fc.weight"] = (hidden, 3 * source)
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    numbers = [value for name in names if isinstance(value := layer.get(name), int)]
    if "kv_lora_rank" in layer or len(numbers) < len(names):
        return shapes  # latent attention has other projections
    heads, groups, inner = numbers
    width = layer.get("head_dim") or hidden // heads
    prefix = "midlayer" if any(name.startswith("midlayer.") for name in served.tensors) else "layers.0"
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,), "hidden_norm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (width * heads, 2 * hidden), "self_attn.k_proj": (width * groups, 2 * hidden),
        "self_attn.v_proj": (width * groups, 2 * hidden), "self_attn.o_proj": (hidden, width * heads),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    return shapes | {f"{prefix}.{name}.weight": shape for name, shape in of_layer.items()}
