"""What runs differently on a GPU: bf16 autocast training, bf16 capture, the canary on the live scan."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from draftcache.capture.verifier.load import load_verifier
from draftcache.capture.verifier.self_check import self_check
from draftcache.capture.verifier.ssm_precision import (
    enforce_contract,
    mamba_mixers,
    require_canary,
    run_canary,
    scan_implementation,
)
from draftcache.draft_train.data.batches import build_batch
from draftcache.draft_train.data.teacher import exact_probabilities
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.draft_train.loss.objective import teacher_probabilities
from draftcache.draft_train.loss.tail_bucket import fused_tail_bucket_loss
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import PrecisionError
from draftcache.tools.demo.pipeline import LAYERS as DEMO_LAYERS
from draftcache.tools.demo.pipeline import VERIFIER
from support.gradient_passes import loss_of, objective
from support.synthetic import conversation, manifest, turns, write_store
from support.teacher_stores import OTHER, SUBSET, write_teacher_store
from support.tiny_models import save_model
from support.training_runs import config, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
CUDA = torch.device("cuda")


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double().cpu() - expected.double().cpu()).norm() / expected.double().norm())


def test_objective_values_and_gradients_against_float64_on_the_cpu() -> None:
    """Float32 on the GPU to 1e-4, bf16 autocast to a few percent, of loss and of every gradient."""
    torch.backends.cuda.matmul.allow_tf32 = False
    shape = Eagle3Shape(
        hidden_size=8, taps=3, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=40, draft_vocab_size=24, sliding_window=64, rope_theta=10_000.0, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = Eagle3Model(shape)
    model.initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10.0)
    table = torch.randn(40, 8, generator=torch.Generator().manual_seed(5))
    rng = np.random.default_rng(0)
    # More than 1,024 start rows, so that the blocked attention path runs.
    items = [conversation(rng, turns(1500, (100, 800), (900, 1490)), window=64) for _ in range(2)]
    batch = build_batch(items, manifest().codec, max_steps=4, window=64)

    def run(model: Eagle3Model, table: torch.Tensor, device: torch.device) -> list[torch.Tensor]:
        made = objective()
        made.target_ids, made.in_draft = made.target_ids.to(device), made.in_draft.to(device)
        loss = loss_of(made, model, table, batch.to(device)).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    exact = run(copy.deepcopy(model).double(), table.double(), torch.device("cpu"))
    on_gpu = model.to(CUDA)
    for value, expected in zip(run(on_gpu, table.to(CUDA), CUDA), exact, strict=True):
        assert relative(value, expected) < 1e-4
    with torch.autocast("cuda", torch.bfloat16):
        for value, expected in zip(run(on_gpu, table.to(CUDA), CUDA), exact, strict=True):
            assert relative(value, expected) < 6e-2


def test_training_on_the_gpu_follows_the_cpu_and_resumes(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6)
    Trainer(config(tmp_path, output=tmp_path / "cpu", epochs=10)).run()
    Trainer(config(tmp_path, output=tmp_path / "gpu", epochs=10, device="cuda")).run()
    cpu, gpu = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("cpu", "gpu"))
    np.testing.assert_allclose(gpu, cpu, rtol=0.05)


@pytest.mark.parametrize(("kind", "size"), [("draft", SUBSET), ("full", OTHER), ("hidden", OTHER)])
@pytest.mark.parametrize("bf16", [False, True])
def test_losses_of_each_teacher_follow_the_cpu(tmp_path: Path, kind: str, size: int, bf16: bool) -> None:
    """Absent entries, and exact teachers from float32 and bf16 states under autocast."""
    write_teacher_store(tmp_path / "store", kind, per_shard=6, bf16=bf16)
    for name in ("cpu", "cuda"):
        made = config(tmp_path, output=tmp_path / name, epochs=10, device=name, draft_vocab_size=size, loss_chunk=16)
        Trainer(made).run()
    cpu, gpu = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("cpu", "cuda"))
    np.testing.assert_allclose(gpu, cpu, rtol=0.05)


def test_fused_loss_and_exact_probabilities_equal_the_cpu() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, logits = (4 * torch.randn(300, 640, generator=generator) for _ in range(2))
    values, ids = teacher.topk(16)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -1)
    ids[7] = -1
    p, tau = teacher_probabilities(values.masked_fill(ids < 0, -torch.inf), teacher.logsumexp(-1))
    results = []
    for device in (torch.device("cpu"), CUDA):
        leaf = logits.to(device).requires_grad_()
        losses = fused_tail_bucket_loss(leaf, ids.to(device), p.to(device), tau.to(device), absent=True)
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), leaf)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-5, atol=2e-5)
    hidden, head = (torch.randn(n, 256, generator=generator).bfloat16() for n in (50, 640))
    expected = torch.softmax(hidden.double() @ head.double().T, -1)
    with torch.autocast("cuda", torch.bfloat16):
        found = exact_probabilities(hidden.to(CUDA), head.to(CUDA))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("kind", "layers"), [("nemotron_h", (0,)), ("llama", (0, 1))])
def test_bf16_capture_is_near_the_float32_reference(tmp_path: Path, kind: str, layers: tuple[int, ...]) -> None:
    """Random weights, so only blocks before the first router, whose flips would amplify rounding."""
    path = save_model(tmp_path, kind)
    ids = torch.randint(0, 600, (300,), generator=torch.Generator().manual_seed(0))
    taps = []
    for device, dtype in ((torch.device("cpu"), torch.float32), (CUDA, torch.bfloat16)):
        verifier = load_verifier(path, device=device, dtype=dtype, trust_remote_code=False)
        enforce_contract(verifier.model, path, allow_fallback=True)
        self_check(verifier, layers, ids)
        taps.append(verifier.forward(ids, layers).taps)
    errors = [relative(taps[1][layer], taps[0][layer]) for layer in layers]
    print(kind, errors)
    assert max(errors) < 3e-2


def test_trained_demo_verifier_in_bf16_agrees_with_float32_on_the_cpu() -> None:
    ids = torch.randint(3, 4096, (200,), generator=torch.Generator().manual_seed(0))
    found = []
    for device, dtype in ((torch.device("cpu"), torch.float32), (CUDA, torch.float32), (CUDA, torch.bfloat16)):
        verifier = load_verifier(VERIFIER, device=device, dtype=dtype, trust_remote_code=False)
        enforce_contract(verifier.model, VERIFIER, allow_fallback=True)
        found.append(verifier.forward(ids, DEMO_LAYERS).taps)
    for layer in DEMO_LAYERS:
        print(layer, relative(found[1][layer], found[0][layer]), relative(found[2][layer], found[0][layer]))
        assert relative(found[1][layer], found[0][layer]) < 1e-3
        assert relative(found[2][layer], found[0][layer]) < 0.1


def test_canary_and_the_refusal_of_the_fallback_scan() -> None:
    verifier = load_verifier(VERIFIER, device=CUDA, dtype=torch.bfloat16, trust_remote_code=False)
    require_canary(run_canary(verifier.model))
    with pytest.raises(PrecisionError, match="canary"):
        require_canary(run_canary(verifier.model, carry_dtype=torch.bfloat16))
    scan = scan_implementation(mamba_mixers(verifier.model)[0])
    print("scan:", scan)
    if scan == "torch":
        with pytest.raises(PrecisionError, match="--allow-fallback"):
            enforce_contract(verifier.model, VERIFIER, allow_fallback=False)
