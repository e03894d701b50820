"""The speculators form of a draft's config.json: the layer's fields inside, the method and the verifier beside them.

The fields are those of speculators 0.9's config classes. vLLM makes its own config of `transformer_layer_config` and of
a few fields beside it (`transformers_utils/configs/speculators/algos.py`); what it does not look at there, it does not
know. Tensors have the same names as in the classic form, but that layers are numbered.
"""

from __future__ import annotations

from typing import Any

from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.draft_train.drafts.serving_target import ServingTarget

SPECULATORS_VERSION = "0.9.0"
"""Version of the library whose fields are written."""
_BESIDE = (
    "architectures", "target_hidden_size", "draft_vocab_size", "norm_before_residual", "fc_norm", "norm_output",
    "eagle_aux_hidden_state_layer_ids", "target_hidden_state_indices", "draftcache", "dtype",
)  # fmt: skip
"""Fields of the classic form that stand beside the layer's, and not inside."""
_NOT_INSIDE = ("eagle_config", "dflash_config", "target_layer_ids", "block_size", "mask_token_id", "markov_rank",
               "dspark_bonus_anchor", "sample_from_anchor", "enable_confidence_head", "confidence_head_with_markov",
               "num_target_layers")  # fmt: skip
"""Fields of the classic form that have other names or places in this one."""


def speculators_config(
    classic: dict[str, Any], kind: str, state: CheckpointState, target: ServingTarget, *, tokens: int, **fields: Any
) -> dict[str, Any]:
    """Return config.json in the speculators form, from the one in the classic form.

    `kind` is the name of the algorithm in speculators, `tokens` what the draft proposes per verify step. `fields` are
    the algorithm's own, which replace those of the classic form.
    """
    beside = {name: classic[name] for name in _BESIDE if name in classic}
    layer = {name: value for name, value in classic.items() if name not in (*_BESIDE, *_NOT_INSIDE)}
    architecture = state.verifier.get("architecture")
    method = {"proposal_type": "greedy", "speculative_tokens": tokens}
    return beside | {
        "speculators_model_type": kind,
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {
                "name_or_path": target.verifier_name or state.verifier["name"],
                "architectures": [architecture] if architecture else [],
            },
        },
        "transformer_layer_config": layer,
        "tie_word_embeddings": False,
        **fields,
    }
