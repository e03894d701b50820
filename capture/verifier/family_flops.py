"""FLOPs of any verifier whose family is known, by its config.json; torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from draftcache.capture.verifier.flops import Flops, gated_flops
from draftcache.capture.verifier.nemotron.flops import nemotron_flops

FAMILY_FLOPS = (nemotron_flops, gated_flops)
"""The function of each class of `families.FORWARDS`, in the same order."""


def has_own_forward(config: Mapping[str, Any]) -> bool:
    """Whether draftcache's own forward runs a verifier of this config.json, rather than transformers' code."""
    return nemotron_flops(config) is not None


def verifier_flops(config: Mapping[str, Any]) -> Flops | None:
    """FLOPs by a Hugging Face config.json, from the first family that knows it; None where no family does."""
    try:
        return next((found for family in FAMILY_FLOPS if (found := family(config)) is not None), None)
    except KeyError:
        return None  # a config that leaves out what transformers has as a default
