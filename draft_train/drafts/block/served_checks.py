"""What is looked for in a DFlash or DSpark draft that an engine is to serve, whoever exported it."""

from __future__ import annotations

from collections.abc import Iterator

from draftcache.draft_train.drafts.block.served import ARCHITECTURES
from draftcache.draft_train.drafts.served_checks import head, required_tensors, shared_findings
from draftcache.draft_train.drafts.served_draft import Finding, ServedDraft, error, warning, whole_numbers
from draftcache.draft_train.drafts.serving_target import sglang_dflash_needs, takes_last_block

IDS = "target_layer_ids"
NESTED = f"dflash_config.{IDS}"
AUX = "eagle_aux_hidden_state_layer_ids"
INSIDE = "aux_hidden_state_layer_ids"
"""Where the speculators form has the ids."""
SERVED_AS = {
    "dflash": ("dflash", "DFlashDraftModel", "DFlashSpeculator"),
    "dspark": ("dspark", "Qwen3DSparkModel", "DSparkSpeculator"),
}
"""By architecture, its names in vLLM's registry and in speculators."""


def findings(served: ServedDraft, name: str) -> Iterator[Finding]:
    """Yield what is wrong with a draft of the architecture `name`, dflash or dspark."""
    yield from shared_findings(served)
    yield from _engine(served, name)
    blocks = _blocks(served)
    yield from _places(served)
    if blocks is not None:
        yield from _meaning(served, blocks)
    yield from _mask_token(served)
    yield from required_tensors(served, _expected_shapes(served, name, blocks))
    yield from head(served, shared_is_usual=True)


def _engine(served: ServedDraft, name: str) -> Iterator[Finding]:
    """SGLang's DFlash worker proposes by the verifier's head over all of its ids; its DSpark was not read."""
    if served.target.engine != "sglang":
        return
    if name == "dspark":
        advice = "serve it with vLLM: what SGLang reads of DSpark is not known here"
        yield warning("engine", "--engine", "vllm for a DSpark draft", "sglang", advice)
    elif served.draft_vocab_size != served.vocab_size or "lm_head.weight" in served.tensors:
        advice = "serve it with vLLM"
        yield error("engine", "lm_head.weight", "no head and all of the verifier's ids", "a head of its own", advice)
    else:
        yield from _not_read_by_sglang(served)


def _not_read_by_sglang(served: ServedDraft) -> Iterator[Finding]:
    """Versions of SGLang that read neither which layers of a DFlash slide nor RoPE's base say nothing of it."""
    theta = served.layer.get("rope_theta") or (served.layer.get("rope_parameters") or {}).get("rope_theta")
    version, slides = served.target.version, "sliding_attention" in (served.layer.get("layer_types") or ())
    for name, (since, earlier) in sglang_dflash_needs(slides, theta).items():
        if version is None:
            advice = f"name yours by --engine-version: {earlier}"
            yield warning("engine-version", "--engine-version", f"{since} or later of SGLang", "none", advice)
            return
        if not served.target.since(since):
            trap = f"{name.replace('_', '-')}-not-read"
            yield error(trap, name, f"SGLang {since} or later, which reads it", version, earlier)


def _blocks(served: ServedDraft) -> list[int] | None:
    """Return the blocks, counted from 0, whose outputs the engine hands over."""
    if served.speculators:
        ids = whole_numbers(served.config.get(INSIDE))
        return None if ids is None else [number - 1 for number in ids]
    if (aux := whole_numbers(served.config.get(AUX))) is not None and served.target.engine == "vllm":
        return [number - 1 for number in aux]
    nested = whole_numbers(served.nested.get(IDS))
    return whole_numbers(served.config.get(IDS)) if nested is None else nested


def _places(served: ServedDraft) -> Iterator[Finding]:
    """The ids are block outputs in dflash_config, and one more in the names that vLLM shares with Eagle3."""
    if served.speculators:
        if whole_numbers(served.config.get(INSIDE)) is None:
            yield error("aux-ids-missing", INSIDE, "the ids of the states that fc reads", "none", "write them")
        return
    nested, top, aux = (whole_numbers(found) for found in (served.nested.get(IDS), *map(served.config.get, (IDS, AUX))))
    if nested is None and top is None and aux is None:
        yield error("aux-ids-missing", NESTED, "the ids of the states that fc reads", "none", "write them")
    elif nested is None:
        advice = "write them there too: vLLM 0.26 takes the width of fc from there, and DFlash's ids"
        yield error("aux-ids-top-level-only", NESTED, f"the ids of {IDS}", "none", advice)
    elif served.config.get("architectures") == [ARCHITECTURES["dspark"]] and top is None and aux is None:
        advice = "write them at the top level too: vLLM 0.26's DSpark takes blocks 2, n//2 and n-3 without a word"
        yield error("aux-ids-nested-only", IDS, f"the ids of {NESTED}", "none", advice)
    wanted = nested or top
    if wanted is not None and top not in (None, wanted):
        yield error("aux-ids-disagree", IDS, f"the ids {wanted} of {NESTED}", top, "write the same in both places")
    if wanted is not None and aux is not None and aux != [number + 1 for number in wanted]:
        advice = "write one more than the block numbers there, as vLLM counts states"
        yield error("aux-ids-disagree", AUX, str([number + 1 for number in wanted]), aux, advice)


def _meaning(served: ServedDraft, blocks: list[int]) -> Iterator[Finding]:
    where, layers = (INSIDE if served.speculators else NESTED), served.verifier.layers
    if blocks != sorted(set(blocks)):
        advice = "engines hand over the states in ascending order, each once: order fc's columns so, and the ids"
        yield error("aux-ids-unsorted", where, "ascending, distinct ids", blocks, advice)
    if served.blocks not in (None, blocks):
        expected = f"ids of the outputs of blocks {served.blocks}"
        advice = (
            "the draft reads other states than it was trained on, and most of its acceptance is lost: export it again"
        )
        yield error("aux-ids-off-by-one", where, expected, f"ids of blocks {blocks}", advice)
    if min(blocks) < 0:
        advice = "the speculators form counts from 1, where 0 is the embeddings; the classic one from 0"
        yield error("aux-ids-off-by-one", where, "outputs of blocks, counted from 0", blocks, advice)
    if layers is None:
        return
    if max(blocks) >= layers:
        advice = "an engine never hands that state over; this is a draft of a deeper verifier, or the ids are shifted"
        yield error("aux-ids-past-the-end", where, f"blocks 0 to {layers - 1} of the verifier", blocks, advice)
    elif max(blocks) == layers - 1 and not takes_last_block(served.verifier, served.target):
        advice = "SGLang is not known to hand it over: serve the draft with vLLM, or train it on another block"
        yield error("aux-ids-last-block", where, f"outputs of blocks before the last, {layers - 1}", blocks, advice)


def _mask_token(served: ServedDraft) -> Iterator[Finding]:
    """Slots read the mask token's embedding: an id out of range reads another row, or none."""
    both = (served.config.get("mask_token_id"), served.nested.get("mask_token_id"))
    named = {number for number in both if number is not None}
    whole = served.vocab_size or 0
    if len(named) != 1 or not all(type(number) is int and 0 <= number < whole for number in named):
        found = sorted(map(str, named)) or "none"
        yield error("mask-token", "mask_token_id", "a mask token of the vocabulary", found, "write the one of training")


def _expected_shapes(served: ServedDraft, name: str, blocks: list[int] | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that an engine loads, by name, as far as config.json tells them."""
    layer = served.layer
    names = ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    values = [value for key in (*names, "num_hidden_layers") if isinstance(value := layer.get(key), int)]
    if blocks is None or len(values) <= len(names):
        return {}
    hidden, width, heads, groups, inner, layers = values
    queries, keys, draft = width * heads, width * groups, served.draft_vocab_size or 0
    source = served.config.get("target_hidden_size") or hidden
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, source * len(blocks)), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,),
    }  # fmt: skip
    rank = served.config.get("markov_rank")
    if name == "dspark" and isinstance(rank, int) and rank:
        shapes["markov_head.markov_w1.weight"] = (served.vocab_size or 0, rank)
        shapes["markov_head.markov_w2.weight"] = (draft, rank)
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_norm": (width,),
        "self_attn.k_norm": (width,), "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for number in range(layers):
        shapes |= {f"layers.{number}.{key}.weight": shape for key, shape in of_layer.items()}
        if served.nested.get("attention_sink_bias"):
            shapes[f"layers.{number}.self_attn.attention_sink_bias"] = (heads,)
    return shapes
