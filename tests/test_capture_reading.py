"""How conversations may be read: what depends on what else is read is read alone, whole, or refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from draftcache.capture.kernels.attention import KeyValues
from draftcache.capture.verifier.load import Verifier, load_verifier
from draftcache.capture.verifier.nemotron import forward as nemotron_forward
from draftcache.capture.verifier.reading import PIECE, CarefulForward, prove_reading
from draftcache.capture.verifier.ssm_precision import lift_dt_limit, mamba_mixers
from draftcache.store.common.errors import InputError
from support.paths import DEMO
from support.tiny_models import VOCAB, save_model

CPU = torch.device("cpu")
TOKENS = 2 * PIECE
IDS = torch.randint(3, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama(tmp_path: Path) -> Verifier:
    path = save_model(tmp_path, "llama")
    return load_verifier(path, device=CPU, dtype=torch.float32, trust_remote_code=False)


def forgetful(scan: Any, *arguments: Any, **named: Any) -> Any:
    found = scan(*arguments, **named)
    return (found[0], 0 * found[1]) if isinstance(found, tuple) else found


@pytest.mark.parametrize(
    ("what", "dtype"),
    [("ssm", torch.float32), ("ssm", torch.bfloat16), ("keys", torch.bfloat16), ("conv", torch.float32)],
)
def test_a_state_that_is_not_carried_is_refused(monkeypatch: pytest.MonkeyPatch, what: str, dtype: torch.dtype) -> None:
    verifier = load_verifier(DEMO, device=CPU, dtype=dtype, trust_remote_code=False)
    lift_dt_limit(mamba_mixers(verifier.model))
    ids = torch.randint(3, 4000, (TOKENS,), generator=torch.Generator().manual_seed(1))
    _, found = prove_reading(verifier, (2, 5, 10), ids, in_pieces=True)
    assert max(found.values()) < 1e-3 if dtype == torch.float32 else 0.02
    if what == "keys":
        monkeypatch.setattr(KeyValues, "append", lambda _self, keys, values: (keys, values))
    elif what == "conv":
        monkeypatch.setattr(nemotron_forward, "_last_rows", lambda rows, _before, count: 0 * rows[:, :count])
    else:
        for block in verifier.body_forward._blocks:  # type: ignore[attr-defined]
            if hasattr(block, "_scan"):
                block._scan = partial(forgetful, block._scan)
    with pytest.raises(InputError, match="does not carry this model's state"):
        prove_reading(verifier, (2, 5, 10), ids, in_pieces=True)


def test_a_plain_model_is_read_as_it_is(llama: Verifier) -> None:
    verifier, found = prove_reading(llama, (1, 3), IDS, in_pieces=True)
    assert verifier is llama
    assert set(found) == {"batch", "repeat", "causal", "pieces"}
    assert max(found.values()) < 1e-4
    assert set(prove_reading(llama, (1,), IDS, in_pieces=False)[1]) == {"batch", "repeat", "causal"}


@pytest.mark.parametrize("fault", ["ignored", "raises"])
def test_a_model_whose_cache_forgets_is_read_whole(llama: Verifier, fault: str) -> None:
    plain: Any = llama.body_forward
    if fault == "ignored":
        plain._cache = "ignored"
    else:
        inner = llama.body.forward

        def refusing(*arguments: Any, **named: Any) -> Any:
            if named.get("use_cache"):
                raise TypeError("this cache is for another model")
            return inner(*arguments, **named)

        llama.body.forward = refusing
    verifier, found = prove_reading(llama, (1,), IDS, in_pieces=True)
    assert found["pieces"] > 0.01
    assert verifier.body_forward.implementations()["pieces"] == "none"
    (piece,) = verifier.prefill(IDS[None], (1,), 16)
    assert piece.taps[1].shape == (1, TOKENS, 32)
    assert torch.equal(piece.taps[1][0], llama.forward(IDS, (1,)).taps[1])


def test_rows_that_depend_on_their_batch_are_read_one_by_one(llama: Verifier) -> None:
    """As where positions are scaled by the longest row."""
    embed = llama.embeddings.forward
    llama.embeddings.forward = lambda ids: embed(ids) * ids.shape[0]  # type: ignore[assignment]
    verifier, found = prove_reading(llama, (1,), IDS, in_pieces=False)
    assert found["batch"] > 0.01
    assert verifier.body_forward.implementations()["conversations"] == "one by one"
    (pair,) = verifier.prefill(torch.stack([IDS, IDS.flip(0)]), (1,), TOKENS)
    for row, ids in enumerate((IDS, IDS.flip(0))):
        assert torch.equal(pair.taps[1][row], llama.forward(ids, (1,)).taps[1])
        assert torch.equal(pair.final[row], llama.forward(ids, (1,)).final)


def test_one_by_one_goes_on_in_pieces(llama: Verifier) -> None:
    careful = replace(llama, body_forward=CarefulForward(llama.body_forward, one_by_one=True, whole=False))
    pieces = list(careful.prefill(torch.stack([IDS, IDS.flip(0)]), (1,), 100))
    assert [piece.first for piece in pieces] == [0, 100, 200]
    whole = llama.forward(IDS.flip(0), (1,)).taps[1]
    assert torch.allclose(torch.cat([piece.taps[1][1] for piece in pieces]), whole, atol=1e-5)


def test_a_model_that_keeps_state_between_calls_is_refused(llama: Verifier) -> None:
    embed, calls = llama.embeddings.forward, []

    def counting(ids: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return embed(ids) * len(calls)  # type: ignore[no-any-return]

    llama.embeddings.forward = counting  # type: ignore[assignment]
    with pytest.raises(InputError, match="keeps state between calls"):
        prove_reading(llama, (1,), IDS, in_pieces=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_forgotten_rows_behind_a_border_are_seen(llama: Verifier, dtype: torch.dtype) -> None:
    """The median over all rows misses them."""
    plain: Any = replace(llama, model=llama.model.to(dtype))
    prefill = plain.body_forward.prefill

    def forgetful_border(token_ids: torch.Tensor, layers: tuple[int, ...], chunk: int) -> Any:
        for piece in prefill(token_ids, layers, chunk):
            if piece.first:
                piece.taps[1][:, :3] *= 1.5
            yield piece

    plain.body_forward.prefill = forgetful_border
    assert prove_reading(plain, (1,), IDS, in_pieces=True)[1]["pieces"] == pytest.approx(0.5, rel=0.05)


def test_states_that_depend_on_later_tokens_are_refused(llama: Verifier) -> None:
    embed = llama.embeddings.forward
    llama.embeddings.forward = lambda ids: embed(ids) * ids.shape[1]  # type: ignore[assignment]
    with pytest.raises(InputError, match="do not depend on the tokens behind them"):
        prove_reading(llama, (1,), IDS, in_pieces=False)
