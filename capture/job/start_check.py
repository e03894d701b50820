"""The checks of a job's verifier at start-up: its configuration before the weights are read, then its forward pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from draftcache.capture.job.calibration import PIECE
from draftcache.capture.job.config import CaptureConfig, layers_by_depth
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.capture.verifier.blocks import block_count
from draftcache.capture.verifier.load import Verifier, load_config
from draftcache.capture.verifier.reading import prove_reading
from draftcache.capture.verifier.self_check import TOKENS, self_check
from draftcache.store.common.errors import InputError


def with_layers(config: CaptureConfig, model: PretrainedConfig | None = None) -> CaptureConfig:
    """Return the settings with the layers that a job without any takes, by its verifier's depth. Raises InputError.

    `model` is the verifier's configuration where it is known already, of its text model.
    """
    if config.layers:
        return config
    model = model or load_config(config.verifier, trust_remote_code=config.trust_remote_code)
    blocks = block_count(model)
    if blocks is None or blocks < 1:
        raise InputError(
            f"{config.verifier / 'config.json'}: expected a number of blocks in num_hidden_layers, found {blocks!r}; "
            "give --layers A,B,C"
        )
    return replace(config, layers=layers_by_depth(blocks, str(model.model_type)))


def check_config(config: CaptureConfig, work: WorkPlan, model: PretrainedConfig | None = None) -> PretrainedConfig:
    """Return the verifier's configuration, which is that of its text model; `model`, where it is known already.

    Only config.json is read, so that a job which can't work is refused before minutes are spent on weights. Raises
    InputError unless the verifier has the blocks of `--layers`, and positions for the longest conversation.
    """
    model = model or load_config(config.verifier, trust_remote_code=config.trust_remote_code)
    for name in ("hidden_size", "vocab_size", "num_hidden_layers"):
        value = getattr(model, name, 1)
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{config.verifier / 'config.json'}: expected {name} to be above 0, found {value!r}")
    blocks = block_count(model)
    if blocks is not None and config.layers[-1] >= blocks:
        raise InputError(
            f"--layers: expected blocks 0 to {blocks - 1} of {config.verifier}, found {list(config.layers)}"
        )
    if config.max_model_len is not None and work.longest > config.max_model_len:
        raise InputError(
            f"{config.dataset}: expected conversations of at most the {config.max_model_len} tokens of "
            f"--max-model-len, found one of {work.longest}; prepare again with --max-length "
            f"{config.max_model_len}, or serve longer ones"
        )
    positions, longest = getattr(model, "max_position_embeddings", None), work.longest
    if positions and 0 < positions < longest:  # a model without a limit has none, or -1
        raise InputError(
            f"{config.dataset}: expected conversations of at most the {positions} tokens that "
            f"{config.verifier / 'config.json'} gives as max_position_embeddings, found one of {longest}; prepare "
            f"again with --max-length {positions}, or raise the value where the model was trained for more"
        )
    return model


def check_tokens(work: WorkPlan) -> Tensor:
    """The first tokens of the data, [256] int64, repeated where the first conversation is shorter.

    Random ids would make outliers of a trained model's states.
    """
    token_ids, _, _ = work.dataset.split(work.splits[0])[0]  # prepare leaves neither a split nor a conversation empty
    return torch.from_numpy(np.resize(token_ids[:TOKENS].astype(np.int64), TOKENS))


def check_verifier(verifier: Verifier, config: CaptureConfig, work: WorkPlan) -> tuple[Verifier, dict[str, float]]:
    """`self_check` and `prove_reading` on the job's data, in pieces where the job reads a conversation in several.

    Returns the verifier as it may read, and the differences by name for the store's provenance. Raises InputError where
    one is too large.
    """
    in_pieces = work.longest > min(PIECE, config.prefill_chunk)
    token_ids = check_tokens(work)
    found = self_check(verifier, config.layers, token_ids)
    drift = max(found[f"tap_{layer}"] for layer in config.layers)
    verifier, reading = prove_reading(verifier, config.layers, token_ids, in_pieces=in_pieces, drift=drift)
    return verifier, found | reading
