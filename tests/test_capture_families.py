"""The families of verifiers: which forward runs a model, what it asks of a piece's length, and FLOPs without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from draftcache.capture.verifier.families import FORWARDS, choose_forward
from draftcache.capture.verifier.family_flops import FAMILY_FLOPS, verifier_flops
from draftcache.capture.verifier.forward import PlainForward
from draftcache.capture.verifier.load import find_modules
from draftcache.capture.verifier.nemotron.forward import NemotronForward
from support.tiny_models import KINDS, make_model

CPU = torch.device("cpu")


def test_the_most_specific_forward_is_taken() -> None:
    nemotron = find_modules(make_model("nemotron_h"), CPU).body_forward
    assert isinstance(nemotron, NemotronForward)
    assert "reason" not in nemotron.implementations()
    llama = find_modules(make_model("llama"), CPU).body_forward
    assert isinstance(llama, PlainForward)
    assert llama.implementations()["reason"] == "LlamaForCausalLM is no NemotronH of transformers"


def test_the_last_forward_runs_what_no_other_supports() -> None:
    model = make_model("nemotron_h")
    model.config.n_group = 2
    found = find_modules(model, CPU)
    plain = choose_forward(model, found.body, found.blocks, found.final_norm)
    assert isinstance(plain, PlainForward)
    assert plain.implementations()["reason"] == "its n_group 2 is not handled"
    assert plain.chunk_multiple == 16  # the model's own code has the same scan


def test_a_piece_is_a_multiple_of_the_scans_chunk() -> None:
    assert [find_modules(make_model(kind), CPU).body_forward.chunk_multiple for kind in KINDS] == [16, 1]
    assert NemotronForward(make_model("nemotron_h", "*E*E")).chunk_multiple == 1


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_the_forwards_own(kind: str) -> None:
    """Both lists have the same families in the same order, and one family at most knows a config."""
    config = make_model(kind).config.to_dict()
    by_forward = [forward.flops(config) for forward in FORWARDS]
    assert by_forward == [family(config) for family in FAMILY_FLOPS]
    assert [found for found in by_forward if found is not None] == [verifier_flops(config)]


def test_flops_need_no_torch() -> None:
    code = "import sys, draftcache.capture.verifier.family_flops; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
