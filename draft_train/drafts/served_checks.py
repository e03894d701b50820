"""Checks of a served draft that all architectures share. Of most of what they find engines say nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from draftcache.draft_train.drafts.served_draft import CONFIG, WEIGHTS, Finding, ServedDraft, error, warning

_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_LEFT_OVER_POSITIONS = 2048
"""`max_position_embeddings` of a Llama config in which nobody set it."""


def shared_findings(served: ServedDraft) -> Iterator[Finding]:
    """Yield what is wrong in the fields that drafts of all architectures have."""
    yield from speculators_fields(served)
    yield from sizes(served)
    yield from tied_embeddings(served)
    yield from windows(served)
    yield from rope(served)
    yield from positions(served)
    yield from dtypes(served)
    yield from vocabulary_map(served)


def speculators_fields(served: ServedDraft) -> Iterator[Finding]:
    """The speculators form: what vLLM and speculators read of the method and the verifier has to be there."""
    if not served.speculators:
        return
    if served.target.engine == "sglang":
        advice = "export the classic form for it"
        yield error("engine", CONFIG, "a form that SGLang reads", "the speculators form, which 0.5.23 does not", advice)
    form = served.config.get("speculators_config")
    form = form if isinstance(form, dict) else {}
    methods = form.get("proposal_methods") or [{}]
    method, verifier = methods[0] if isinstance(methods, list) else {}, form.get("verifier") or {}
    wanted = {
        "speculators_config.algorithm": form.get("algorithm"),
        "speculators_config.default_proposal_method": form.get("default_proposal_method"),
        "speculators_config.proposal_methods[0].proposal_type": method.get("proposal_type"),
        "speculators_config.proposal_methods[0].speculative_tokens": method.get("speculative_tokens"),
        "speculators_config.verifier.name_or_path": verifier.get("name_or_path"),
        "transformer_layer_config": served.layer,
    }
    for name, value in wanted.items():
        if not value:
            advice = "write it: vLLM and speculators read it"
            yield error("speculators-fields", name, "a value, as in speculators 0.9", "none", advice)


def sizes(served: ServedDraft) -> Iterator[Finding]:
    """The draft reads the verifier's states and embeddings, so widths and ids have to be the verifier's."""
    for name in ("hidden_size", "vocab_size"):
        own, wanted = served.layer.get(name), getattr(served.verifier, name)
        if own is None:
            yield error("sizes", name, "a number", "none", "write the verifier's")
        elif wanted is not None and own != wanted:
            yield error("sizes", name, f"the verifier's {wanted}", own, "this is a draft of another verifier")


def tied_embeddings(served: ServedDraft) -> Iterator[Finding]:
    """A draft that says its head is its embeddings loses its head, as SGLang then makes none."""
    name = "tie_word_embeddings"
    for where, fields in (("", served.config), ("transformer_layer_config.", served.layer)):
        if fields.get(name) is True:
            advice = "write false: the draft has a head of its own, or the verifier's, and never its embeddings"
            yield error("tied-embeddings", where + name, "false", "true", advice)
            return
    if served.layer.get(name) is None:
        advice = "write false: some config classes take a missing field for true"
        yield warning("tied-embeddings", name, "false", "none", advice)


def windows(served: ServedDraft) -> Iterator[Finding]:
    """A window holds only for layers that `layer_types` names; without it vLLM attends to all positions."""
    layer = served.layer
    window, types, use = (layer.get(name) for name in ("sliding_window", "layer_types", "use_sliding_window"))
    if served.nested.get("use_swa"):
        return
    asked, layers = bool(window) and use is not False, layer.get("num_hidden_layers", 1)
    wanted = f"sliding_attention or full_attention for each of {layers} layers"
    if types is None:
        if asked:
            advice = f"write it: without it the window of {window} is silently full attention"
            yield error("window-without-layer-types", "layer_types", wanted, "none", advice)
        return
    if len(types) != layers:
        yield error("layer-types-count", "layer_types", wanted, types, "write one for each layer")
    sliding = "sliding_attention" in types
    if sliding and not window:
        yield error(
            "layer-types-without-window", "sliding_window", "a window for the sliding layers", window, "write it"
        )
    elif sliding and use is False and layer.get("model_type") == "qwen3":
        advice = "write true: Qwen3's config drops the window otherwise"
        yield error("window-switched-off", "use_sliding_window", "true", "false", advice)
    elif asked and not sliding:
        advice = f"say which layers slide, or leave the window of {window} out"
        yield error("window-without-layer-types", "layer_types", "a sliding_attention layer", types, advice)


def rope(served: ServedDraft) -> Iterator[Finding]:
    """RoPE is `rope_theta` and `rope_scaling` in configs of transformers 4 and `rope_parameters` in those of 5."""
    old, found = served.layer.get("rope_theta"), served.layer.get("rope_parameters")
    new = found if isinstance(found, dict) else {}
    by_type = [item for item in new.values() if isinstance(item, dict)]
    groups = by_type or [new]
    thetas = {item["rope_theta"] for item in groups if item.get("rope_theta") is not None}
    both = "rope_theta and rope_parameters.rope_theta, equal"
    if old is None and not thetas:
        advice = "write both: engines take 10,000 or 1,000,000 without a word"
        yield error("rope-missing", "rope_theta", both, "neither", advice)
    elif old is not None and thetas and thetas != {old}:
        yield error(
            "rope-disagrees", "rope_theta", both, f"{old} and {sorted(thetas)}", "write what it was trained with"
        )
    elif old is None:
        advice = "write both: what reads configs of transformers 4 takes 10,000 without a word"
        yield warning("rope-new-schema-only", "rope_theta", both, f"rope_parameters only ({sorted(thetas)})", advice)
    elif not thetas:
        advice = "write both: transformers 5 reads rope_parameters, and not every config class converts the old field"
        yield warning("rope-old-schema-only", "rope_parameters", both, f"rope_theta only ({old})", advice)
    scaling = _scaling(served.layer.get("rope_scaling"))
    if old is not None and new and not by_type and scaling != _scaling(new):
        names = ("rope_scaling", "the same scaling in rope_scaling and rope_parameters")
        yield error("rope-disagrees", *names, f"{scaling} and {_scaling(new)}", "write what it was trained with")


def _scaling(fields: Any) -> dict[str, Any]:
    """Return what scales the frequencies, without theta; empty where nothing does."""
    fields = dict(fields) if isinstance(fields, dict) else {}
    kind = fields.pop("rope_type", None) or fields.pop("type", None) or "default"
    fields = {name: value for name, value in fields.items() if name not in ("rope_theta", "type")}
    return {} if kind == "default" else {"rope_type": kind, **fields}


def positions(served: ServedDraft) -> Iterator[Finding]:
    """Engines end drafts at `max_position_embeddings`, or let them read rotations past the end of their table."""
    name, trap = "max_position_embeddings", "max-positions"
    own, wanted = served.layer.get(name), served.verifier.max_position_embeddings
    if not own:
        yield error(trap, name, "a number above 0", own, "write the verifier's: engines need it")
    elif wanted is not None and own < wanted:
        advice = "past it vLLM's drafts were garbage before it raised the number by itself; serve no longer contexts"
        yield warning(trap, name, f"the verifier's {wanted} or more", own, advice)
    elif wanted is None and own == _LEFT_OVER_POSITIONS:
        advice = "look whether somebody set it: it is a Llama config's default; --verifier compares"
        yield warning(trap, name, "the verifier's", own, advice)


def dtypes(served: ServedDraft) -> Iterator[Finding]:
    """SGLang loads a draft in the dtype that config.json names, so that has to be the weights' own."""
    found = {_FLOATS[item.dtype] for item in served.tensors.values() if item.dtype in _FLOATS}
    if served.quantized or not found:
        return
    fields = served.config | {name: value for name, value in served.layer.items() if name in ("dtype", "torch_dtype")}
    named = {str(fields[name]).removeprefix("torch.") for name in ("dtype", "torch_dtype") if fields.get(name)}
    if len(named) > 1:
        yield error("dtype", "dtype", "one dtype in dtype and torch_dtype", sorted(named), "write the weights'")
    elif not named:
        yield warning("dtype", "dtype", f"the weights' {sorted(found)}", "none", "write it: float32 is the default")
    elif not named <= found:
        advice = "write the weights': engines convert them without a word"
        yield error("dtype", "dtype", f"the weights' {sorted(found)}", sorted(named), advice)
    if len(found) > 1:
        yield warning("mixed-dtypes", WEIGHTS, "weights of one dtype", sorted(found), "save them all alike")


def required_tensors(served: ServedDraft, expected: Mapping[str, tuple[int, ...]]) -> Iterator[Finding]:
    """Yield the tensors of `expected`, {name: shape}, that are missing or have another shape."""
    if served.quantized:
        return
    if not served.tensors:
        level = warning if any(served.path.glob("*.bin")) else error
        advice = "save the weights as safetensors: pickles are not read here, so nothing is known of the tensors"
        yield level("weights-missing", WEIGHTS, "the draft's tensors", "no safetensors", advice)
        return
    if prefixed := sorted(name for name in served.tensors if name.startswith("model.")):
        advice = "save them without it: vLLM adds one itself"
        yield error("tensor-prefix", prefixed[0], "names without the prefix model.", f"{len(prefixed)} with it", advice)
        return
    for name, shape in expected.items():
        found = served.tensors.get(name)
        if found is None:
            yield error("tensor-missing", name, f"a tensor {list(shape)}", "none", "export the whole draft")
        elif found.shape != shape:
            advice = f"look which of weights and {CONFIG} belongs to another draft"
            yield error("tensor-shape", name, str(list(shape)), list(found.shape), advice)


def head(served: ServedDraft, *, shared_is_usual: bool) -> Iterator[Finding]:
    """A missing head is silently the verifier's, whose rows a reduced vocabulary does not have.

    `shared_is_usual` where drafts of this architecture that propose all ids have no head of their own.
    """
    draft, whole, hidden = served.draft_vocab_size, served.vocab_size, served.layer.get("hidden_size")
    found = served.tensors.get("lm_head.weight")
    if not served.tensors:
        return
    if found is None and not any(name.startswith("lm_head.") for name in served.tensors):
        advice = "export the head: engines take the verifier's without a word"
        if draft != whole:
            yield error("head-missing", "lm_head.weight", f"a head of {draft} rows", "none", advice)
        elif not shared_is_usual:
            yield warning("head-missing", "lm_head.weight", "the draft's own head", "none", advice)
    elif found is not None and not served.quantized and found.shape != (draft, hidden):
        advice = "write the head's rows as draft_vocab_size"
        yield error("head-shape", "lm_head.weight", str([draft, hidden]), list(found.shape), advice)


def vocabulary_map(served: ServedDraft) -> Iterator[Finding]:
    """d2t holds for each draft id the target id minus the draft id; engines add it without a check."""
    draft, whole, header = served.draft_vocab_size, served.vocab_size, served.tensors.get("d2t")
    if draft is None or whole is None:
        return
    if header is None:
        if draft != whole and served.tensors:
            advice = "export it: engines take draft id i for target id i without a word"
            yield error("d2t-missing", "d2t", f"{draft} offsets", "none", advice)
    elif header.shape != (draft,):
        yield error("d2t-shape", "d2t", str([draft]), list(header.shape), "write one offset for each draft id")
    elif header.dtype not in ("I64", "I32"):
        yield error("d2t-dtype", "d2t", "whole numbers (int64)", header.dtype, "save it as int64")
    else:
        yield from _offsets(served, draft, whole)


def _offsets(served: ServedDraft, draft: int, whole: int) -> Iterator[Finding]:
    values = served.array("d2t").astype(np.int64)
    targets = values + np.arange(draft)
    absolute = "subtract 0, 1, 2, ...: these are target ids themselves, to which engines add the draft ids"
    ascending = draft > 1 and bool((np.diff(values) > 0).all()) and values.min() >= 0 and values.max() < whole
    marks = served.tensors.get("t2d")
    if marks is not None:
        if math.prod(marks.shape) != whole:
            yield error("t2d-shape", "t2d", str([whole]), list(marks.shape), "write one mark for each target id")
            return
        chosen = np.flatnonzero(served.array("t2d"))
        if not np.array_equal(chosen, targets):
            if np.array_equal(chosen, values):
                yield error("d2t-absolute", "d2t", "offsets", "target ids", absolute)
            else:
                advice = "export both from one vocabulary map"
                yield error("d2t-t2d", "d2t", "d2t and t2d to name the same target ids", "them to differ", advice)
            return
    if targets.min() < 0 or targets.max() >= whole:
        if ascending:
            yield error("d2t-absolute", "d2t", "offsets", "ascending target ids", absolute)
        else:
            found = f"ids from {targets.min()} to {targets.max()}"
            yield error("d2t-range", "d2t", f"target ids below {whole}", found, "export the map of this verifier")
    elif len(np.unique(targets)) < draft:
        yield error(
            "d2t-repeats", "d2t", "another target id for each draft id", "repeated ones", "export the map again"
        )
    elif marks is None and ascending:
        yield warning("d2t-absolute", "d2t", "offsets", "values that ascend as target ids do", absolute)
