"""Stores of each teacher: what verify finds in them, repair, conversion, and what inspect and size say of them."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from draftcache.store.common.errors import InputError, StoreError, StoreVersionError
from draftcache.store.convert import Conversion
from draftcache.store.format.bf16 import bf16_to_float32
from draftcache.store.format.frozen import frozen_tensor
from draftcache.store.format.manifest import StoreManifest, top_level_names
from draftcache.store.format.schema import Conversation
from draftcache.store.format.teacher import TEACHERS, DraftVocab, TeacherForm
from draftcache.store.format.teacher_stats import describe, tail_mass
from draftcache.store.reader import StoreReader
from draftcache.store.repair import repair_store
from draftcache.store.row_checks import check_conversation
from draftcache.store.storage.base import open_storage
from draftcache.store.tar_stream import TarStream
from draftcache.store.verify import verify_store
from draftcache.tools.cli import main
from draftcache.tools.commands import size
from draftcache.tools.reports.inspection import decode_conversation, summarise
from draftcache.tools.reports.sizes_text import format_sizes
from support.synthetic import DRAFT_VOCAB, HIDDEN, VOCAB, manifest
from support.teacher_stores import OTHER, SUBSET, head, maps, write_teacher_store

FURTHER = f"log_z_draft_{OTHER}"


@pytest.mark.parametrize("kind", TEACHERS)
def test_form_names_every_array_once(kind: str) -> None:
    made = manifest(teacher=kind, more_draft_vocabs={"10": "a", "30": "b"})
    form, specs = made.teacher_form, made.array_specs()
    assert form.sizes == (DRAFT_VOCAB, 10, 30)
    assert set(form.array_specs()) == {"teacher_positions", "argmax", *form.entry_specs(), *form.scalars} <= set(specs)
    assert ("teacher_hidden" in specs) == (kind == "hidden")
    assert top_level_names(made)[1:] == tuple(f"vocab_map{end}.safetensors" for end in ("", "_10", "_30"))
    assert form.choose() == form.choose(DRAFT_VOCAB) == form.main
    with pytest.raises(InputError, match=r"of sizes \[24, 10, 30\], found 11"):
        form.choose(11)
    with pytest.raises(InputError, match="sizes that differ"):
        _ = manifest(teacher=kind, more_draft_vocabs={str(DRAFT_VOCAB): "a"}).teacher_form
    with pytest.raises(InputError, match="teacher: expected one of"):
        _ = manifest(teacher="top").teacher_form


def test_dtypes_follow_the_vocabulary_and_the_compute_dtype() -> None:
    wide = manifest().verifier | {"vocab_size": (1 << 16) + 1}
    for kind, verifier, expected in (
        ("draft", wide, "uint16"), ("full", wide, "uint32"), ("full", wide | {"vocab_size": 1 << 16}, "uint16")
    ):  # fmt: skip
        assert manifest(teacher=kind, verifier=verifier).array_specs()["teacher_ids"].dtype == expected
    for mode in ("float32", "bf16", "fp8"):
        for compute, expected in (("float32", "float32"), ("bfloat16", "uint16")):
            spec = manifest(teacher="hidden", mode=mode, compute_dtype=compute).array_specs()["teacher_hidden"]
            assert (spec.dtype, spec.inner) == (expected, (HIDDEN,))


@pytest.mark.parametrize("layout", ["zarr", "webdataset"])
@pytest.mark.parametrize(("kind", "bf16"), [("draft", False), ("full", False), ("hidden", False), ("hidden", True)])
def test_verify_repair_and_every_changed_file(tmp_path: Path, kind: str, bf16: bool, layout: str) -> None:
    """One byte of each file of the teacher, changed: verify names it, and reading refuses it."""
    write_teacher_store(tmp_path / "s", kind, bf16=bf16, layout=layout, per_shard=2)
    report = verify_store(tmp_path / "s")
    assert report.finished
    assert report.damages == []
    teacher = manifest(teacher=kind, more_draft_vocabs={"10": "", "30": ""}).teacher_form.array_specs()
    files = [path for path in (tmp_path / "s" / "shards").rglob("c.*") if path.parent.name in teacher]
    files += list((tmp_path / "s").glob("*.safetensors"))
    assert len(files) == (4 if layout == "webdataset" else 4 + 2 * len(teacher))
    for path in files:
        relative = path.relative_to(tmp_path / "s")
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "s", copy)
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 0x40
        (copy / relative).write_bytes(data)
        assert relative.as_posix() in {item.name for item in verify_store(copy).damages}
        if path.suffix == ".safetensors":
            with pytest.raises(StoreError, match="xxh3-128"):
                _ = StoreReader(copy).files
            repaired = repair_store(copy, verify_store(copy))
            assert repaired.files == [relative.name]
            assert not (copy / relative).exists()
        shutil.rmtree(copy)


def test_another_map_in_the_place_of_a_further_one_is_damage(tmp_path: Path) -> None:
    """Its own hash is right, but it isn't the manifest's: as if a record had been made for it."""
    from draftcache.store.common.files import hash_file
    from draftcache.store.format.commits import record_name, write_record

    write_teacher_store(tmp_path / "s", "full", per_shard=1)
    name, storage = f"vocab_map_{SUBSET}.safetensors", open_storage(tmp_path / "s")
    maps()[2].save(tmp_path / "s" / name)
    storage.delete(record_name(Path(name).stem))
    entry = {"bytes": (tmp_path / "s" / name).stat().st_size, "xxh3_128": hash_file(tmp_path / "s" / name)}
    write_record(storage, Path(name).stem, {"files": {name: entry}})
    (damage,) = verify_store(tmp_path / "s").damages
    assert (damage.name, "expected vocabulary" in damage.problem) == (name, True)
    with pytest.raises(StoreError, match="expected vocabulary"):
        StoreReader(tmp_path / "s").vocab_map(SUBSET)


def change(name: str, place: Any, value: Any) -> Any:
    def apply(item: Conversation) -> Conversation:
        values = item.arrays[name].copy()
        values[place] = value
        return replace(item, arrays=item.arrays | {name: values})

    return apply


@pytest.mark.parametrize(
    ("kind", "broken", "said"),
    [
        ("hidden", change("teacher_hidden", (3, 2), np.nan), "teacher_hidden: expected finite"),
        ("hidden", change("teacher_hidden", 3, 0.0), "teacher_hidden: expected non-zero rows, found 1 "),
        ("hidden", change(FURTHER, 2, np.inf), f"{FURTHER}: expected finite"),
        ("hidden", change("teacher_max", 2, 99.0), "log_z_draft >= teacher_max"),
        ("draft", change(FURTHER, 2, 99.0), f"log_z_full >= {FURTHER}"),
        ("draft", change("teacher_ids", (1, 0), DRAFT_VOCAB), f"ids below {DRAFT_VOCAB}"),
        ("full", change("teacher_ids", (1, 0), VOCAB), f"ids below {VOCAB}"),
        ("full", change("teacher_max", 2, 99.0), "log_z_full >= teacher_max"),
        ("full", change("teacher_gaps", (2, 0), 1.0), "teacher_gaps: expected 0 first"),
    ],
)
def test_row_checks_of_each_teacher(tmp_path: Path, kind: str, broken: Any, said: str) -> None:
    write_teacher_store(tmp_path / "s", kind, per_shard=1)
    reader = StoreReader(tmp_path / "s")
    item = reader.read(0)
    assert check_conversation(item, reader.manifest) == []
    problems = check_conversation(broken(item), reader.manifest)
    assert any(said in problem for problem in problems), problems


def test_tail_of_the_draft_vocabulary_in_a_top_k_over_all(tmp_path: Path) -> None:
    write_teacher_store(tmp_path / "s", "full", top_k=12, per_shard=1)
    reader = StoreReader(tmp_path / "s")
    arrays, main = reader.read(0).arrays, maps()[0]
    expected = []
    for row in range(len(arrays["teacher_ids"])):
        logits = arrays["teacher_max"][row] - arrays["teacher_gaps"][row].astype(np.float64)
        inside = [z for z, i in zip(logits, arrays["teacher_ids"][row], strict=True) if main.t2d[i]]
        expected.append(1 - np.exp(np.array(inside) - arrays["log_z_draft"][row]).sum())
    found = tail_mass(arrays, main.t2d)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (tail_mass(arrays) < found - 1e-3).any(), "control: entries outside the vocabulary are no part of it"
    assert reader.specs["teacher_ids"].inner == (12,)
    assert int(arrays["teacher_ids"].max()) >= DRAFT_VOCAB


@pytest.mark.parametrize(("kind", "bf16"), [("draft", False), ("full", False), ("hidden", False), ("hidden", True)])
def test_there_and_back_and_in_other_shards(tmp_path: Path, kind: str, bf16: bool) -> None:
    write_teacher_store(tmp_path / "a", kind, bf16=bf16)
    Conversion(tmp_path / "a", tmp_path / "b", layout="webdataset", mode="fp8").run()
    Conversion(tmp_path / "a", tmp_path / "c", layout="webdataset", shard_tokens=100).run()
    Conversion(tmp_path / "c", tmp_path / "d", layout="zarr", shard_tokens=160).run()
    one, last = StoreReader(tmp_path / "a"), StoreReader(tmp_path / "d")
    names = list(one.manifest.teacher_form.array_specs())
    for other in ("b", "c", "d"):
        assert verify_store(tmp_path / other).damages == []
        two = StoreReader(tmp_path / other)
        for number in range(len(one)):
            before, after = one.read(number, names).arrays, two.read(number, names).arrays
            assert all(np.array_equal(before[name], after[name]) for name in names)
        for vocab in maps():
            assert two.vocab_map(len(vocab)).hash == vocab.hash
    in_draft = maps()[0].t2d if kind == "full" else None
    for number, record in enumerate(last.records()):
        members = np.flatnonzero(last.index["shard"] == number)
        tails = [tail_mass(last.read(int(member)).arrays, in_draft) for member in members]
        assert record["tail_mass"] == describe(np.concatenate(tails))
    assert ({"count": 0} in [record["tail_mass"] for record in last.records()]) == (kind == "hidden")


def test_states_go_through_tar_streams(tmp_path: Path) -> None:
    write_teacher_store(tmp_path / "s", "hidden", bf16=True, layout="webdataset")
    found = [item for batch in TarStream(tmp_path / "s", split="train") for item in batch]
    expected = StoreReader(tmp_path / "s")
    by_hash = {expected.read(number).content_hash: expected.read(number) for number in range(len(expected))}
    assert len(found) == 4
    for item in found:
        assert np.array_equal(item.arrays["teacher_hidden"], by_hash[item.content_hash].arrays["teacher_hidden"])


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", TEACHERS)
def test_inspect_shows_the_same_choices(
    tmp_path: Path, kind: str, bf16: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    write_teacher_store(tmp_path / "s", kind, bf16=bf16)
    reader = StoreReader(tmp_path / "s")
    table = decode_conversation(reader, 1)["table"]
    rows = [row["teacher"] for row in table if row["teacher"] is not None]
    write_teacher_store(tmp_path / "states", "hidden", bf16=True)
    arrays = StoreReader(tmp_path / "states").read(1).arrays
    logits = bf16_to_float32(arrays["teacher_hidden"]).astype(np.float64) @ head().T
    if kind != "full":
        logits[:, ~maps()[0].t2d] = -np.inf
    for row, over, log_z in zip(rows, logits, arrays["log_z_full"], strict=True):
        best = np.argsort(-over, kind="stable")[:3]
        assert [choice["token_id"] for choice in row["choices"]] == best.tolist()
        probabilities = [choice["probability"] for choice in row["choices"]]
        np.testing.assert_allclose(probabilities, np.exp(over[best] - log_z), rtol=2e-3)
        assert (row["tail_mass"] is None) == (kind == "hidden")
    shown = summarise(tmp_path / "s")
    assert shown["teacher"] == kind
    assert list(shown["more_draft_vocabs"]) == [str(SUBSET), str(OTHER)]
    assert (shown["tail_mass"] is None) == (kind == "hidden")
    assert main(["inspect", str(tmp_path / "s")]) == 0
    assert main(["inspect", str(tmp_path / "s"), "--conversation", "1"]) == 0
    printed = capsys.readouterr().out
    assert f"teacher {kind}, top-k {'none' if kind == 'hidden' else 6}" in printed
    assert f"and       {OTHER}, {maps()[2].hash}" in printed


def test_frozen_tensors_are_read_exactly(tmp_path: Path) -> None:
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    tensors = {"a": values, "b": values.bfloat16(), "c": values.half(), "d": torch.arange(3)}
    save_file(tensors, tmp_path / "f.safetensors")
    for name in "abc":
        assert np.array_equal(frozen_tensor(tmp_path / "f.safetensors", name), tensors[name].float().numpy())
    for name in "dx":
        with pytest.raises(StoreError, match=f"float tensor {name}"):
            frozen_tensor(tmp_path / "f.safetensors", name)


def test_stores_of_the_version_before_are_refused(tmp_path: Path) -> None:
    write_teacher_store(tmp_path / "s", "draft", per_shard=1)
    path = tmp_path / "s" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 4}))
    with pytest.raises(StoreVersionError, match="expected layout version 5, found 4; capture it again"):
        StoreManifest.load(open_storage(tmp_path / "s"))


def sizes(*flags: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    size.add_arguments(parser)
    guess = ("--tokens", "1e6", "--loss-fraction", "0.5", "--mean-length", "1e3", "--draft-vocab-size", "32000")
    return size.size(parser.parse_args([*guess, *flags]))


def test_size_of_each_teacher(tmp_path: Path) -> None:
    """Differences of the estimates are those of the arrays, position by position, but for padding of last chunks."""
    config = {"model_type": "llama", "hidden_size": 256, "vocab_size": 131_072, "num_hidden_layers": 60}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = ("--verifier", str(tmp_path), "--mode", "bf16")
    found = {kind: sizes(*shape, "--teacher", kind)["modes"]["bf16"]["arrays"] for kind in TEACHERS}
    assert found["full"]["teacher_ids"] == pytest.approx(2 * found["draft"]["teacher_ids"], rel=0.01)
    assert found["hidden"]["teacher_hidden"] == pytest.approx(4 * found["draft"]["teacher_gaps"], rel=0.03)
    assert "teacher_ids" not in found["hidden"]
    plain, more = sizes(*shape), sizes(*shape, "--more-vocab-sizes", "8000,16000")
    arrays = more["modes"]["bf16"]["arrays"]
    assert arrays["log_z_draft_8000"] == arrays["log_z_draft_16000"] == arrays["log_z_draft"]
    assert more["frozen_bytes"] - plain["frozen_bytes"] == 24_000 * (2 * 256 + 8) + 2 * 131_072
    assert "final-norm states, draft vocabulary of 32,000" in format_sizes(sizes(*shape, "--teacher", "hidden"))
    for flags, said in (
        (("--hidden-size", "8", "--teacher", "full"), "--verifier or --dataset beside it"),
        (("--hidden-size", "8", "--teacher", "top"), "--teacher: expected one of"),
        ((*shape, "--more-vocab-sizes", "32000"), "--more-vocab-sizes: expected sizes"),
        ((*shape, "--teacher", "full", "--top-k", "131073"), "at most the verifier's 131072"),
    ):
        with pytest.raises(InputError, match=said):
            sizes(*flags)


def test_a_form_needs_no_store() -> None:
    form = TeacherForm(
        kind="hidden", top_k=0, vocab_size=9, hidden_size=4, compute_dtype="bfloat16",
        vocabularies=(DraftVocab(size=5, hash=""), DraftVocab.further(3)),
    )  # fmt: skip
    assert form.scalars == ("teacher_max", "log_z_full", "log_z_draft", "next_token_logit", "log_z_draft_3")
    assert form.ids_below == 5
