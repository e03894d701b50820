"""Our forward on a GPU: beside the model's own code, in pieces, in batches, on trained weights in bf16 and float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from draftcache.capture.verifier.forward import PlainForward
from draftcache.capture.verifier.load import load_verifier
from draftcache.capture.verifier.nemotron.forward import NemotronForward
from draftcache.capture.verifier.ssm_precision import enforce_contract, mamba_mixers, scan_implementation
from draftcache.capture.verifier.teacher import TeacherHead, teacher_signal
from draftcache.store.format.teacher import TEACHERS, DraftVocab, TeacherForm
from support.paths import DEMO
from support.verifier_forwards import run, tokens, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]
LAYERS = (2, 5, 10)


def forwards(dtype: torch.dtype, device: str = "cuda") -> tuple[NemotronForward, PlainForward]:
    found = load_verifier(DEMO, device=torch.device(device), dtype=dtype, trust_remote_code=False)
    enforce_contract(found.model, DEMO, allow_fallback=True)
    print("scan:", scan_implementation(mamba_mixers(found.model)[0]))
    return NemotronForward(found.model), PlainForward(found.body, found.blocks, found.final_norm)


def on(device: str, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return tokens(batch, length, seed).to(device)


def test_bf16_is_as_near_to_float32_as_the_models_code() -> None:
    ours, plain = forwards(torch.bfloat16)
    exact = [tensor.cuda() for tensor in run(forwards(torch.float32, "cpu")[1], on("cpu", 1, 700), LAYERS)]
    ids = on("cuda", 1, 700)
    errors = [worst([t.float() for t in run(forward, ids, LAYERS)], exact) for forward in (ours, plain)]
    print("relative error to float32, ours and the model's:", errors)
    assert errors[0] < 1.15 * errors[1] < 0.1


def test_float32_equals_the_models_code() -> None:
    ours, plain = forwards(torch.float32)
    ids = on("cuda", 2, 300)
    assert worst(run(ours, ids, LAYERS), run(plain, ids, LAYERS)) < 1e-3


@pytest.mark.parametrize("chunk", [128, 256, 100])
def test_pieces_and_batches_are_within_the_rounding_of_bf16(chunk: int) -> None:
    """Sums are formed in another order; what bf16's rounding makes of that is measured beside one flipped low bit."""
    ours, _ = forwards(torch.bfloat16)
    ids = on("cuda", 1, 700)
    whole = run(ours, ids, LAYERS)
    pieces = worst([t.float() for t in run(ours, ids, LAYERS, chunk)], [t.float() for t in whole])
    batch = torch.zeros(3, 900, dtype=torch.int64, device="cuda")
    batch[0], batch[1, :700], batch[2, :5] = on("cuda", 1, 900, 1)[0], ids[0], 7
    together = [tensor[1:2, :700] for tensor in run(ours, batch, LAYERS)]
    padded = worst([t.float() for t in together], [t.float() for t in whole])
    print("relative difference of pieces and of a padded batch:", pieces, padded)
    assert pieces < 2e-2
    assert padded < 2e-2


@pytest.mark.parametrize("kind", TEACHERS)
def test_teacher_equals_the_cpu(kind: str) -> None:
    found = load_verifier(DEMO, device=torch.device("cuda"), dtype=torch.bfloat16, trust_remote_code=False)
    final = torch.randn(300, found.hidden_size, device="cuda").to(torch.bfloat16)
    following = on("cuda", 1, 300)[0]
    targets = torch.arange(0, found.vocab_size, 2, device="cuda")
    form = TeacherForm(
        kind=kind,
        top_k=16,
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        compute_dtype="bfloat16",
        vocabularies=(DraftVocab(size=len(targets), hash=""), DraftVocab.further(100)),
    )
    heads = TeacherHead(head=found.head, form=form, target_ids=(targets, targets[:100]), slice_rows=128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu = teacher_signal(final, following, heads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = replace(heads, head=found.head.cpu(), target_ids=(targets.cpu(), targets[:100].cpu()), slice_rows=7)
    cpu = teacher_signal(final.cpu(), following.cpu(), host)
    assert float((gpu["argmax"].cpu() == cpu["argmax"]).float().mean()) > 0.99
    if kind == "hidden":
        assert torch.equal(gpu["teacher_hidden"].cpu(), cpu["teacher_hidden"])
    for name in form.scalars:
        torch.testing.assert_close(gpu[name].cpu(), cpu[name], rtol=1e-4, atol=1e-4)
