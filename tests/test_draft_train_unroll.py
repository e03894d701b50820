"""The unroll against an independent dense reference, values and gradients, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from draftcache.draft_train.data.batches import build_batch
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.eagle3.unroll import unroll
from draftcache.draft_train.drafts.eagle3.window_attention import dense_window_attention, window_attention
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.rows import run_lengths
from draftcache.store.format.schema import Conversation
from support.draft_batches import MASKS
from support.draft_models import EAGLE31, STEPS, WINDOW, embeddings, make_model
from support.synthetic import HIDDEN, LAYERS, conversation, manifest, turns


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    """Half rotation of one head [D] as complex numbers: x_i + i x_{i + D/2} times exp(i position theta^(-2i/D))."""
    half = x.shape[-1] // 2
    angle = position * 10_000.0 ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean() + 1e-5) * weight


def naive(
    model: Eagle3Model, table: torch.Tensor, item: Conversation, window: int | None
) -> dict[tuple[int, int], torch.Tensor]:
    """Un-normed outputs by (row, step), from the page's formulas: one row, one head, one key at a time."""
    layer, mask = model.midlayer, item.loss_mask
    attn, tokens = layer.self_attn, item.arrays["token_ids"].astype(int)
    aux = torch.from_numpy(np.concatenate([item.arrays[tap_name(number)] for number in LAYERS], axis=1)).double()
    positions = item.arrays["positions"].tolist()
    if model.shape.fc_norm:
        norms = [model.get_parameter(f"fc_norm.{number}.weight") for number in range(len(LAYERS))]
        normed = [[rms(tap, norm) for tap, norm in zip(row.split(HIDDEN), norms, strict=True)] for row in aux]
        aux = torch.stack([torch.cat(row) for row in normed])
    base = {t: model.fc.weight @ aux[row] for row, t in enumerate(positions)}
    width, heads, groups = model.shape.head_dim, 4, 2

    def project(t: int, k: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.cat(
            (rms(table[tokens[t + 1 + k]], layer.input_layernorm.weight), rms(hidden, layer.hidden_norm.weight))
        )
        q, key, value = attn.q_proj.weight @ x, attn.k_proj.weight @ x, attn.v_proj.weight @ x
        q = torch.stack([rotate(part, t + k) for part in q.view(heads, width)])
        key = torch.stack([rotate(part, t + k) for part in key.view(groups, width)])
        return q, key, value.view(groups, width)

    step0 = {t: project(t, 0, hidden) for t, hidden in base.items()}
    outputs = {}
    run = run_lengths(mask)
    for t in positions:
        hidden, own = base[t], []
        for k in range(STEPS):
            if not (t + 2 + k < len(mask) and mask[t + 1] and run[t + 2] > k):
                break
            q, key, value = project(t, k, hidden)
            if k:
                own.append((key, value))
            seen = [step0[j][1:] for j in positions if j <= t and (window is None or t + k - j < window)] + own
            parts = []
            for head in range(heads):
                group = head // (heads // groups)
                scores = torch.stack([q[head] @ pair[0][group] for pair in seen]) / math.sqrt(width)
                weights = torch.softmax(scores, 0)
                parts.append(sum(w * pair[1][group] for w, pair in zip(weights, seen, strict=True)))
            after = hidden + attn.o_proj.weight @ torch.cat(parts)
            x = rms(after, layer.post_attention_layernorm.weight)
            gate, up = layer.mlp.gate_proj.weight @ x, layer.mlp.up_proj.weight @ x
            hidden = after + layer.mlp.down_proj.weight @ (torch.nn.functional.silu(gate) * up)
            outputs[t, k] = hidden
            if model.shape.norm_output:
                hidden = rms(hidden, model.norm.weight)
    return outputs


def fast_outputs(
    model: Eagle3Model, items: list[Conversation], window: int | None
) -> dict[tuple[int, int, int], torch.Tensor]:
    batch = build_batch(items, manifest().codec, max_steps=STEPS, window=window)
    found = {}
    for step in unroll(model, embeddings(), batch, STEPS):
        for row, hidden in zip(step.rows.tolist(), step.hidden, strict=True):
            number = int(batch.conversation[row])
            first = int((batch.conversation < number).sum())
            starts = [t for t in items[number].arrays["positions"].tolist() if is_start(items[number], t)]
            found[number, starts[row - first], step.number] = hidden
    return found


def is_start(item: Conversation, t: int) -> bool:
    mask = item.loss_mask
    return t + 2 < len(mask) and bool(mask[t + 1]) and bool(mask[t + 2])


def gradients(
    model: Eagle3Model, outputs: dict[tuple[int, ...], torch.Tensor], keys: list[tuple[int, ...]]
) -> list[torch.Tensor]:
    """Gradients of a fixed random projection of the outputs, in the order of `keys`."""
    generator = torch.Generator().manual_seed(11)
    total = sum((outputs[key] * torch.randn(HIDDEN, generator=generator).double()).sum() for key in keys)
    assert isinstance(total, torch.Tensor)
    unused = ("lm_head",) if model.shape.norm_output else ("norm", "lm_head")
    wanted = [value for name, value in model.named_parameters() if not name.startswith(unused)]
    return list(torch.autograd.grad(total, wanted))


@pytest.mark.parametrize(
    ("name", "window", "switches"),
    [(name, window, {}) for name in MASKS for window in (WINDOW, 3, None)]
    + [("one turn", WINDOW, {"fc_norm": True}), ("one turn", WINDOW, {"norm_output": True})]
    + [(name, WINDOW, EAGLE31) for name in MASKS],
)
def test_unroll_equals_the_naive_reference(name: str, window: int | None, switches: dict[str, bool]) -> None:
    model = make_model(window, **switches)
    item = conversation(np.random.default_rng(1), MASKS[name])
    expected = naive(model, embeddings(), item, window)
    found = {key[1:]: value for key, value in fast_outputs(model, [item], window).items()}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9)
    keys = sorted(expected)
    for ours, theirs in zip(gradients(model, found, keys), gradients(model, expected, keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("switch", EAGLE31)
def test_each_switch_of_eagle31_changes_the_outputs(switch: str) -> None:
    """With the same matrices, and the weights of `fc_norm` at 1; `norm_output` leaves step 0 as it is."""
    plain, switched = make_model(), make_model(**{switch: True})
    switched.load_state_dict(
        plain.state_dict() | {name: torch.ones(HIDDEN) for name in switched.state_dict() if name.startswith("fc_norm")}
    )
    item = conversation(np.random.default_rng(1), MASKS["one turn"])
    before, after = (fast_outputs(model, [item], WINDOW) for model in (plain, switched))
    assert before.keys() == after.keys()
    changed = {key[-1] for key in before if not torch.allclose(before[key], after[key], rtol=1e-3)}
    assert changed == set(range(STEPS)) - ({0} if switch == "norm_output" else set())


def test_a_window_that_ignores_the_step_is_told_apart() -> None:
    """Negative control: windowing by t - j at every step, as some trainers do, changes later steps."""
    model = make_model()
    item = conversation(np.random.default_rng(1), MASKS["one turn"])
    expected = naive(model, embeddings(), item, WINDOW)
    wider = naive(model, embeddings(), item, WINDOW + 1)
    assert any(not torch.allclose(expected[key], wider[key]) for key in expected)


def test_packed_conversations_equal_separate_ones() -> None:
    model = make_model()
    rng = np.random.default_rng(2)
    items = [conversation(rng, mask) for mask in MASKS.values()]
    packed = fast_outputs(model, items, WINDOW)
    for number, item in enumerate(items):
        for (_, t, k), value in fast_outputs(model, [item], WINDOW).items():
            torch.testing.assert_close(packed[number, t, k], value, rtol=1e-8, atol=1e-9)


def test_pruned_rows_change_nothing_and_one_row_more_does() -> None:
    model = make_model()
    mask = turns(60, (30, 40), (55, 59))
    full = conversation(np.random.default_rng(4), mask)
    pruned = conversation(np.random.default_rng(4), mask, window=WINDOW)
    assert 0 < len(pruned.arrays["positions"]) < len(full.arrays["positions"])
    expected, found = fast_outputs(model, [full], WINDOW), fast_outputs(model, [pruned], WINDOW)
    keys = sorted(expected)
    for ours, theirs in zip(gradients(model, found, keys), gradients(model, expected, keys), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    arrays = dict(pruned.arrays)
    for name in ("positions", *[tap_name(layer) for layer in LAYERS]):
        arrays[name] = arrays[name][1:]
    short = fast_outputs(model, [replace(pruned, arrays=arrays)], WINDOW)
    assert any(not torch.allclose(short[key], expected[key], rtol=1e-6) for key in keys)


@pytest.mark.parametrize("kept_scores", [0, 1 << 26])
def test_blocked_attention_equals_dense(monkeypatch: pytest.MonkeyPatch, kept_scores: int) -> None:
    """With scores recomputed in the backward pass and with scores kept."""
    monkeypatch.setattr("draftcache.draft_train.drafts.eagle3.window_attention.QUERY_BLOCK", 5)
    monkeypatch.setattr("draftcache.draft_train.drafts.eagle3.window_attention.KEPT_SCORES", kept_scores)
    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    key_positions = torch.arange(50)[torch.rand(50, generator=generator) < 0.8]
    query_index = torch.arange(8, len(key_positions))[::2]
    positions = key_positions[query_index]
    queries = len(positions)
    q, k, v = make(4, queries, 6), make(2, len(key_positions), 6), make(2, len(key_positions), 6)
    own = [make(2, queries, 6) for _ in range(4)]
    results = []
    for function in (dense_window_attention, window_attention):
        output = function(q, k, v, own[:2], own[2:], positions, key_positions, step=2, window=9)
        grads = torch.autograd.grad((output * torch.arange(6)).sum(), [q, k, v, *own])
        results.append([output, *grads])
    for dense, blocked in zip(*results, strict=True):
        torch.testing.assert_close(blocked, dense, rtol=1e-10, atol=1e-12)
