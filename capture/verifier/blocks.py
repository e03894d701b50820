"""Finds the parts of a causal LM that capture reads, in any model class, also inside of a model for images and text."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from draftcache.store.common.errors import InputError


def model_class(config: Any) -> Any:
    """Return the class of transformers that loads a language model of this configuration.

    A model for images or sound and text has a language model inside, of which only the text is used.
    """
    if getattr(config, "auto_map", None):
        return transformers.AutoModelForCausalLM
    for candidate in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
    ):
        if type(config) in candidate._model_mapping:
            return candidate
    return transformers.AutoModelForCausalLM  # which says what it knows


def block_count(config: Any) -> int | None:
    """Return the number of blocks that a text model's configuration gives; None where it gives none.

    `num_hidden_layers` is the encoder's in a configuration of encoder and decoder, and counts each block as often as it
    has attention in some others, which give their blocks as `num_layers`.
    """
    counts = (getattr(config, name, None) for name in ("decoder_layers", "num_layers", "num_hidden_layers"))
    return next((count for count in counts if isinstance(count, int)), None)


def find_blocks(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """Return the stack of blocks and the module that holds it, beside the embeddings. Raises InputError."""
    count = block_count(model.config.get_text_config())
    embeddings = model.get_input_embeddings()
    stacks = [
        (name, module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    holders = [(model.base_model.get_submodule(name.rpartition(".")[0]), name, blocks) for name, blocks in stacks]
    # An encoder of images may have as many blocks: the language model is the one that holds the embeddings.
    beside = [item for item in holders if any(module is embeddings for module in item[0].modules())]
    if not holders:
        raise InputError(
            f"{type(model).__name__}: expected a stack of {count or 'so many'} blocks, as its configuration counts "
            "them, found none; what is captured is the output of such blocks, so use another verifier"
        )
    holder, _, blocks = min(beside or holders, key=lambda item: item[1].count("."))
    rivals = [stack for other, _, stack in holders if other is holder]
    return holder, blocks if len(rivals) == 1 else _reported_stack(model, rivals)


def _reported_stack(model: Any, stacks: list[nn.ModuleList]) -> nn.ModuleList:
    """Of stacks that a model calls in turn, each a part of its blocks (XLM), the one that gives what it reports last.

    The first one where none does, which the self-check will refuse.
    """
    made: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                made[number] = output

        return hook

    handles = [stack[-1].register_forward_hook(keep(number)) for number, stack in enumerate(stacks)]
    try:
        with torch.inference_mode():
            output = model(input_ids=_short_input(model), use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    last = output.hidden_states[-1] if output.hidden_states else None
    chosen = [number for number, state in made.items() if last is not None and torch.equal(state, last)]
    return stacks[chosen[0] if chosen else 0]


def _short_input(model: Any) -> torch.Tensor:
    return torch.ones(1, 4, dtype=torch.int64, device=next(model.parameters()).device)


def text_body(model: Any, holder: nn.Module) -> Any:
    """Return the module that runs token ids through the blocks: the text's part of a model of several."""
    whole = model.config.get_text_config() is model.config
    return model.base_model if whole else holder


def find_final_norm(model: Any, holder: nn.Module, reader: nn.Module) -> nn.Module:
    """Return the norm whose output `reader` reads: the head, or a projection before it. Raises InputError without one.

    In a model of a body and a head, the one module beside the blocks that is named as a norm is taken. In any other,
    the module that makes the head's input in a short forward: behind the blocks, in the last of them where a block ends
    with its norm, or between body and head where the head has layers of its own.
    """
    names = [name for name, _ in holder.named_children() if "norm" in name.lower() or name == "ln_f"]
    named = [holder.get_submodule(name) for name in names if "embed" not in name]
    if len(named) == 1 and _is_body_and_head(model):
        return named[0]
    found = _maker_of_input(model, reader)
    if found is None and len(named) == 1:
        return named[0]
    if found is None or isinstance(found, nn.ModuleList | nn.Embedding) or found is holder:
        raise InputError(
            f"{type(model).__name__}: expected a final norm whose output the head reads, found none in "
            f"{type(holder).__name__}; a draft reads what such a norm gives"
        )
    return found


def _is_body_and_head(model: Any) -> bool:
    """Whether nothing with weights is beside the base model and the head."""
    head = model.get_output_embeddings()
    others = [child for child in model.children() if child is not head and next(child.parameters(), None) is not None]
    return others == [model.base_model] and any(child is head for child in model.children())


def _maker_of_input(model: Any, reader: nn.Module) -> nn.Module | None:
    """The innermost module whose output is what `reader` gets; None where no module made it."""
    made: list[tuple[nn.Module, torch.Tensor]] = []
    read: list[torch.Tensor] = []

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            made.append((module, output))

    handles = [module.register_forward_hook(keep) for module in model.modules() if not isinstance(module, nn.Linear)]
    handles.append(reader.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0])))
    try:
        with torch.inference_mode():
            model(input_ids=_short_input(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not read:
        return None
    # The head may get a view of all rows. All tensors are still alive, so an address belongs to one of them.
    place, shape = read[-1].data_ptr(), read[-1].shape
    return next((module for module, output in made if (output.data_ptr(), output.shape) == (place, shape)), None)
