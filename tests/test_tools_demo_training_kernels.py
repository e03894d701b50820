"""The training stand-ins equal the model's own functions."""

from __future__ import annotations

import pytest
import torch
from transformers.models.nemotron_h import modeling_nemotron_h

from draftcache.tools.demo.corpus import training_kernels
from draftcache.tools.demo.corpus.verifier_model import build_model


def test_model_output_equals_the_unmodified_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mamba2_chunk_scan", "causal_conv1d_fn", "mamba2_split_conv1d_scan_combined"):
        monkeypatch.setattr(modeling_nemotron_h, name, getattr(modeling_nemotron_h, name))
    model = build_model(0).eval()
    ids = torch.randint(0, 4096, (2, 192), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.model(input_ids=ids, use_cache=False).last_hidden_state
        training_kernels.install(model, modeling_nemotron_h)
        found = model.model(input_ids=ids, use_cache=False).last_hidden_state
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    counts = [m.get_buffer("expert_counts").sum() for m in model.modules() if hasattr(m, "expert_counts")]
    assert [int(count) for count in counts] == [2 * ids.numel()] * 5
