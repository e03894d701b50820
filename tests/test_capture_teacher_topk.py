"""The teacher signal in each form against brute force, and capture to evaluation on tiny verifiers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.kernels.row_stats import largest, part_largest
from draftcache.capture.prepare.draft_vocabulary import load_vocab_maps
from draftcache.capture.verifier.teacher import TeacherHead, teacher_signal
from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.store.format.bf16 import bf16_to_float32
from draftcache.store.format.teacher import TEACHERS, DraftVocab, TeacherForm
from draftcache.store.format.teacher_stats import tail_mass
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.reader import StoreReader
from draftcache.store.verify import verify_store
from draftcache.tools.cli import main
from support.capture_jobs import config, small_dataset
from support.tiny_models import VOCAB, save_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
MAIN, FURTHER = torch.arange(0, VOCAB, 2), torch.arange(5, 300, 7)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"), tokenizer_dir)


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("nemotron"), "nemotron_h")


def form(kind: str, dtype: str = "float32", top_k: int = 5) -> TeacherForm:
    return TeacherForm(
        kind=kind,
        top_k=top_k,
        vocab_size=VOCAB,
        hidden_size=16,
        compute_dtype=dtype,
        vocabularies=(DraftVocab(size=len(MAIN), hash=""), DraftVocab.further(len(FURTHER))),
    )


def signal_of(kind: str, dtype: torch.dtype, declared: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The signal in slices of 7 rows, and float64 logits."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, VOCAB, bias=False).requires_grad_(False).to(dtype)
    head.weight.uniform_(-0.25, 0.25, generator=generator)
    final = torch.randn(23, 16, generator=generator).to(dtype)
    realised = torch.randint(0, VOCAB, (23,), generator=generator)
    heads = TeacherHead(head=head, form=form(kind, declared), target_ids=(MAIN, FURTHER), slice_rows=7)
    signal = teacher_signal(final, realised, heads)
    logits = final.double() @ head.weight.double().T
    of_realised = logits.gather(1, realised[:, None])[:, 0]
    torch.testing.assert_close(signal["next_token_logit"].double(), of_realised, rtol=1e-5, atol=1e-5)
    if kind == "hidden":
        stored = signal.pop("teacher_hidden")
        assert torch.equal(stored.view(dtype), final)
    return signal, logits


@pytest.mark.parametrize(("width", "number"), [(5, 5), (700, 12), (640, 10), (704, 10), (640 + 63, 9), (32_000, 64)])
@pytest.mark.parametrize("at", ["anywhere", "the end"])
def test_largest_is_topk(width: int, number: int, at: str) -> None:
    logits = torch.randn(30, width, generator=torch.Generator().manual_seed(0))
    if at == "the end":
        logits[:, -number:] += 10
    expected = torch.topk(logits, number, dim=-1)
    for found, value in zip(largest(logits, part_largest(logits), number), expected, strict=True):
        assert torch.equal(found, value)
    ties = logits.round()
    values, columns = largest(ties, part_largest(ties), number)
    assert torch.equal(values, torch.topk(ties, number, dim=-1).values)
    assert torch.equal(values, ties.gather(1, columns))
    assert all(row.unique().numel() == number for row in columns)
    if width == 32_000 and at == "anywhere":  # negative control: parts that are chosen by anything else
        wrong, _ = largest(logits, part_largest(-logits), number)
        assert not torch.equal(wrong, expected.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TEACHERS)
def test_teacher_signal_is_the_softmax_it_says(kind: str, dtype: torch.dtype) -> None:
    declared = str(dtype).removeprefix("torch.")
    signal, logits = signal_of(kind, dtype, declared)
    found = {name: signal[name].double() for name in form(kind).scalars}
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found["log_z_full"], logits.logsumexp(-1), **close)
    torch.testing.assert_close(found["log_z_draft"], logits[:, MAIN].logsumexp(-1), **close)
    torch.testing.assert_close(found[f"log_z_draft_{len(FURTHER)}"], logits[:, FURTHER].logsumexp(-1), **close)
    assert torch.equal(signal["argmax"], logits.argmax(-1))
    over = logits if kind == "full" else logits[:, MAIN]
    torch.testing.assert_close(found["teacher_max"], over.amax(-1), **close)
    assert ("teacher_ids" in signal) == (kind != "hidden")
    if kind != "hidden":
        assert torch.equal(signal["teacher_ids"], over.topk(5).indices)
        restored = found["teacher_max"][:, None] - signal["teacher_gaps"].double()
        torch.testing.assert_close(restored, over.topk(5).values, rtol=0, atol=2e-3)


def test_states_of_another_dtype_are_refused_and_not_rounded() -> None:
    with pytest.raises(InputError, match="compute dtype bfloat16, found float32"):
        signal_of("hidden", torch.float32, "bfloat16")


def write_map(path: Path, ids: np.ndarray, vocab_size: int) -> Path:
    VocabMap(target_ids=np.asarray(ids, np.int64), vocab_size=vocab_size).save(path)
    return path


@pytest.fixture(scope="module")
def more(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A subset of 40 of the dataset's 200 ids, and 120 ids of which some are outside it."""
    base, root = VocabMap.load(dataset / "vocab_map.safetensors"), tmp_path_factory.mktemp("maps")
    outside = np.setdiff1d(np.arange(base.vocab_size), base.target_ids)
    other = np.sort(np.concatenate((base.target_ids[:70], outside[:50])))
    return (
        write_map(root / "subset", base.target_ids[::5], base.vocab_size),
        write_map(root / "other", other, base.vocab_size),
    )


def direct_logits(item: Any, verifier: Any) -> torch.Tensor:
    """[P, V] float32 of the model's own forward pass."""
    ids = torch.from_numpy(item.arrays["token_ids"].astype(np.int64))
    with torch.inference_mode():
        output = verifier.model(input_ids=ids[None], use_cache=False)
    return output.logits[0][item.arrays["teacher_positions"].astype(np.int64)].float()


def train(store: Path, output: Path, *flags: str) -> int:
    values = ["--store", store, "--output", output, "--splits", "train", "--batch-conversations", 4, "--device", "cpu"]
    values += ["--num-attention-heads", 4, "--num-key-value-heads", 2, "--head-dim", 8, "--sliding-window", 20]
    return main(["train", *map(str, values), "--loss-chunk", "16", *flags])


@pytest.mark.parametrize("kind", TEACHERS)
def test_capture_train_and_evaluate(
    nemotron: Path,
    dataset: Path,
    more: tuple[Path, Path],
    tmp_path: Path,
    kind: str,
) -> None:
    job = CaptureJob(config(nemotron, dataset, tmp_path / "s", teacher=kind, more_vocab_maps=more))
    job.run()
    assert verify_store(tmp_path / "s").damages == []
    store = StoreReader(tmp_path / "s")
    assert store.manifest.teacher_form.sizes == (200, 40, 120)
    heads = load_file(store.files.frozen)
    for vocab in store.manifest.teacher_form.vocabularies:
        ids = torch.from_numpy(store.vocab_map(vocab.size).target_ids)
        assert torch.equal(heads[vocab.head], job.verifier.head.weight[ids])
    for number in range(2):
        item = store.read(number)
        logits = direct_logits(item, job.verifier)
        for vocab in store.manifest.teacher_form.vocabularies:
            ids = torch.from_numpy(store.vocab_map(vocab.size).target_ids)
            np.testing.assert_allclose(item.arrays[vocab.log_z], logits[:, ids].logsumexp(-1), rtol=1e-5, atol=1e-5)
        check_kept(kind, store, item, logits)
    for flags in ((), ("--draft-vocab-size", "40"), ("--draft-vocab-size", "120")):
        run = tmp_path / "-".join(("run", *flags))
        if kind == "draft" and "120" in flags:
            assert train(tmp_path / "s", run, *flags) == 2
            continue
        assert train(tmp_path / "s", run, *flags) == 0
        command = ["eval", "--store", tmp_path / "s", "--checkpoint", run, "--splits", "val"]
        assert main([*map(str, command), "--output", str(run / "eval.json")]) == 0
        figures = json.loads((run / "eval.json").read_text())["splits"]["val"]["draft"]
        assert figures["acceptance_length"] >= 1


def check_kept(kind: str, store: StoreReader, item: Any, logits: torch.Tensor) -> None:
    arrays, targets = item.arrays, torch.from_numpy(store.vocab_map().target_ids)
    if kind == "hidden":
        states = torch.from_numpy(arrays["teacher_hidden"])
        again = states @ load_file(store.files.frozen)["lm_head"].T
        np.testing.assert_allclose(arrays["log_z_draft"], again.logsumexp(-1), rtol=1e-6, atol=1e-6)
        assert tail_mass(arrays).size == 0
        return
    over = logits if kind == "full" else logits[:, targets]
    values = torch.from_numpy(arrays["teacher_ids"].astype(np.int64))
    assert store.specs["teacher_ids"].dtype == "uint16"
    assert torch.equal(values.sort(-1).values, over.topk(16).indices.sort(-1).values)
    in_draft = np.isin(np.arange(logits.shape[1]), targets)
    p = torch.softmax(logits[:, targets], -1)
    inside = torch.zeros(logits.shape, dtype=torch.float32).index_copy(1, targets, p)
    kept = inside.gather(1, values) if kind == "full" else p.gather(1, values)
    found = tail_mass(arrays, in_draft if kind == "full" else None)
    np.testing.assert_allclose(found, 1 - kept.sum(-1), atol=2e-3)


def test_bf16_states_are_kept_bit_for_bit_in_any_mode(
    nemotron: Path,
    dataset: Path,
    tmp_path: Path,
) -> None:
    """The taps' mode loses bits, the teacher's states do not."""
    changes = {"teacher": "hidden", "mode": "fp8", "compute_dtype": "bfloat16", "batch_tokens": 1, "splits": ("val",)}
    job = CaptureJob(config(nemotron, dataset, tmp_path / "s", **changes))
    job.run()
    item = StoreReader(tmp_path / "s").read(0)
    ids = torch.from_numpy(item.arrays["token_ids"].astype(np.int64))[None]
    (piece,) = job.verifier.prefill(ids, (0,), 1 << 20)
    final = piece.final[0][item.arrays["teacher_positions"].astype(np.int64)]
    assert final.dtype == torch.bfloat16
    assert item.arrays["teacher_hidden"].dtype == np.uint16
    assert np.array_equal(item.arrays["teacher_hidden"], final.contiguous().view(torch.uint16).numpy())
    assert np.abs(bf16_to_float32(item.arrays["teacher_hidden"])).max() > 0


def test_refusals(nemotron: Path, dataset: Path, more: tuple[Path, Path], tmp_path: Path) -> None:
    made = config(nemotron, dataset, tmp_path / "s", more_vocab_maps=more[:1])
    CaptureJob(made).run()
    for other in (replace(made, teacher="full"), replace(made, more_vocab_maps=more), replace(made, teacher="hidden")):
        with pytest.raises(ManifestMismatchError, match=r"teacher|more_draft_vocabs"):
            CaptureJob(other).run()
    with pytest.raises(InputError, match=r"--teacher: expected one of \['draft', 'full', 'hidden'\], found 'top'"):
        config(nemotron, dataset, tmp_path / "t", teacher="top")
    with pytest.raises(InputError, match="--top-k: expected at most the draft vocabulary's 200, found 201"):
        CaptureJob(config(nemotron, dataset, tmp_path / "t", top_k=201))
    CaptureJob(config(nemotron, dataset, tmp_path / "t", top_k=201, teacher="full"))
    with pytest.raises(InputError, match="--top-k: expected at most the verifier's 640 token ids, found 641"):
        CaptureJob(config(nemotron, dataset, tmp_path / "t", top_k=641, teacher="full"))


def test_further_vocabularies_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    base = write_map(tmp_path / "base", np.arange(10), 50)
    with pytest.raises(InputError, match=r"expected a size other than \[10\], found 10"):
        load_vocab_maps(base, [write_map(tmp_path / "same", np.arange(3, 13), 50)])
    smaller = write_map(tmp_path / "smaller", np.arange(5), 50)
    with pytest.raises(InputError, match=r"expected a size other than \[10, 5\], found 5"):
        load_vocab_maps(base, [smaller, smaller])
    with pytest.raises(InputError, match="a map over 50 token ids"):
        load_vocab_maps(base, [write_map(tmp_path / "foreign", np.arange(5), 51)])
    assert [len(item) for item in load_vocab_maps(base, [smaller])] == [10, 5]


def test_a_head_with_bias_has_no_exact_teacher(
    nemotron: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: CaptureConfig = config(nemotron, dataset, tmp_path / "s", teacher="hidden")
    from draftcache.capture.job import worker_job as batch_job

    load = batch_job.load_verifier

    def with_bias(*args: Any, **named: Any) -> Any:
        found = load(*args, **named)
        found.head.bias = torch.nn.Parameter(torch.zeros(found.vocab_size))
        return found

    monkeypatch.setattr(batch_job, "load_verifier", with_bias)
    with pytest.raises(InputError, match="expected a head without bias"):
        CaptureJob(settings)
