"""`draftcache probe`: dumps of the trained demo verifier, beside Hugging Face's states and files in vLLM's form."""

from __future__ import annotations

import argparse
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftcache.capture.verifier.load import load_verifier
from draftcache.capture.verifier.ssm_precision import lift_dt_limit, mamba_mixers
from draftcache.store.common.errors import GateError, InputError
from draftcache.tools.commands import probe
from draftcache.tools.probe.compare import Comparison, compare_files
from draftcache.tools.probe.dump import ProbeConfig, dump_states
from draftcache.tools.probe.files import METADATA_KEY, read_states
from support.paths import DEMO
from support.tiny_models import save_model

CPU = torch.device("cpu")
LAYERS = (2, 5, 10)
BLOCKS, HIDDEN = 12, 256
AUX_IDS = (3, 6, 11)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def dump(path: Path, **settings: Any) -> Path:
    dump_states(ProbeConfig(**({"verifier": DEMO, "output": path, "layers": LAYERS} | settings)))
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dump(tmp_path_factory.mktemp("probe") / "ours.safetensors")


@pytest.fixture(scope="module")
def hf(ours: Path) -> tuple[Tensor, list[Tensor]]:
    """Token ids [L] and Hugging Face's `output_hidden_states` [L, H], computed without the code under test."""
    ids = load_file(ours)["token_ids"]
    model = load_verifier(DEMO, device=CPU, dtype=torch.bfloat16, trust_remote_code=False).model
    lift_dt_limit(mamba_mixers(model))
    with torch.inference_mode():
        output = model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
    return ids, [state[0].clone() for state in output.hidden_states]


@pytest.fixture(scope="module")
def aux(ours: Path) -> tuple[Tensor, Tensor]:
    """What vLLM writes for AUX_IDS: token ids [L], states [L, 3, H] in bfloat16."""
    tensors = load_file(ours)
    states = [tensors[f"hidden_states.{layer}"].to(torch.bfloat16) for layer in LAYERS]
    return tensors["token_ids"], torch.stack(states, dim=1)


def save(path: Path, token_ids: Tensor, hidden_states: Tensor) -> Path:
    save_file({"token_ids": token_ids, "hidden_states": hidden_states.contiguous()}, path)
    return path


def rewrite(dumped: Path, path: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A dump with other tensors, or other details in its metadata."""
    with safe_open(dumped, framework="pt") as file:
        details = json.loads(file.metadata()[METADATA_KEY])
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(details | changes)})
    return path


def run(*flags: str | Path) -> int:
    parser = argparse.ArgumentParser()
    probe.add_arguments(parser)
    return probe.run(parser.parse_args([str(flag) for flag in flags]))


def problems(found: Comparison) -> dict[str, str]:
    return {match.name: match.problem for match in found.matches if match.problem}


def test_dump_states_its_conventions(ours: Path) -> None:
    with safe_open(ours, framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == [METADATA_KEY]
    details = json.loads(metadata[METADATA_KEY])
    tensors = load_file(ours)
    names = ["embeddings", *(f"hidden_states.{block}" for block in range(BLOCKS)), "final_norm"]
    assert tensors.keys() == {"token_ids", *names}
    assert details["tensors"].keys() == set(names)
    length = len(tensors["token_ids"])
    assert length > 100
    assert tensors["token_ids"].dtype == torch.int64
    assert {tuple(tensors[name].shape) for name in names} == {(length, HIDDEN)}
    assert details["tensors"]["hidden_states.5"] == {
        "layer": 5, "point": "output", "hf_hidden_states_index": 6, "vllm_aux_id": 6,
    }  # fmt: skip
    assert details["tensors"]["hidden_states.11"]["hf_hidden_states_index"] is None
    assert details["tensors"]["hidden_states.11"]["vllm_aux_id"] == 12
    assert details["tensors"]["embeddings"]["hf_hidden_states_index"] == 0
    assert details["tensors"]["final_norm"]["hf_hidden_states_index"] == 12
    assert details["layers"] == list(LAYERS)
    assert (details["forward"], details["dtype"]) == ("draftcache", "float32")
    assert (details["ssm"]["canary_max"], details["ssm"]["carry_dtype"]) == (264.0, "float32")
    assert details["torch"] == torch.__version__
    assert details["verifier"]["layers"] == BLOCKS


def test_the_same_command_gives_the_same_bytes(ours: Path, tmp_path: Path) -> None:
    assert dump(tmp_path / "again.safetensors").read_bytes() == ours.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.safetensors"]


def test_the_models_own_states_have_offset_0(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = dump(tmp_path / "transformers.safetensors", source="transformers")
    found = compare_files(ours, other)
    assert found.fits
    assert found.offset == 0
    assert found.taps == {2: 2, 5: 5, 10: 10}
    assert len(found.matches) == BLOCKS + 1  # all but the last block, which Hugging Face gives after the norm only
    assert [match.best for match in found.matches][-2:] == ["block 10", "final norm"]
    assert max(match.difference or 0.0 for match in found.matches) < 1e-5
    assert run("--compare", ours, other) == 0
    shown = capsys.readouterr().out
    assert "fits: engine id = block, for 13 of 13 states" in shown
    assert "2 -> 2, 5 -> 5, 10 -> 10" in shown
    swapped = compare_files(other, ours)
    assert problems(swapped) == {"hidden_states.11": "no block within 0.05"}
    assert swapped.notes == ["ours holds no output of block 11: nothing can match those"]


@pytest.mark.parametrize("form", ["hidden_states.{}", "hidden_states_{}", "batched", "stacked", "stacked batch"])
def test_hugging_face_indices_have_offset_1(
    ours: Path, hf: tuple[Tensor, list[Tensor]], tmp_path: Path, form: str
) -> None:
    """bfloat16 against our float32; the last entry is after the final norm and contradicts nothing."""
    ids, states = hf
    path = tmp_path / "hf.safetensors"
    if form.startswith("stacked"):
        stack = torch.stack(states)
        save(path, ids, stack if form == "stacked" else stack[:, None])
    elif form == "batched":
        named = {f"hidden_states.{index}": state[None].clone() for index, state in enumerate(states)}
        save_file(named | {"input_ids": ids[None]}, path)
    else:
        save_file({form.format(index): state for index, state in enumerate(states)} | {"token_ids": ids}, path)
    found = compare_files(ours, path)
    assert (found.fits, found.offset) == (True, 1)
    assert found.taps == dict(zip(LAYERS, AUX_IDS, strict=True))
    assert [match.best for match in found.matches] == [
        "embeddings", *(f"block {block}" for block in range(BLOCKS - 1)), "final norm",
    ]  # fmt: skip
    assert found.matches[-1].offset is None
    assert 1e-4 < max(match.difference or 0.0 for match in found.matches) < 0.02
    subject = "place" if form.startswith("stacked") else "engine id"
    assert found.verdict == f"fits: {subject} = block + 1, for 13 of 13 states"


def test_the_final_norm_in_another_place_is_refused(
    ours: Path, hf: tuple[Tensor, list[Tensor]], tmp_path: Path
) -> None:
    ids, states = hf
    path = tmp_path / "hf.safetensors"
    save_file({"token_ids": ids, "hidden_states.3": states[3], "hidden_states.6": states[-1]}, path)
    found = compare_files(ours, path)
    assert (found.fits, found.offset) == (False, 1)
    assert problems(found) == {
        "hidden_states.6": "expected the output of block 5, found the state after the final norm"
    }


@pytest.mark.parametrize(("ids", "offset"), [(AUX_IDS, 1), (LAYERS, 0), ((4, 7, 12), 2)])
def test_vllm_form_names_the_offset_of_its_ids(
    ours: Path, aux: tuple[Tensor, Tensor], tmp_path: Path, ids: tuple[int, ...], offset: int
) -> None:
    found = compare_files(ours, save(tmp_path / "v.safetensors", *aux), ids=ids)
    assert (found.fits, found.offset) == (True, offset)
    assert [match.best for match in found.matches] == ["block 2", "block 5", "block 10"]
    assert all(match.second_difference > 10 * match.difference for match in found.matches)  # type: ignore[operator]
    assert list(found.taps.values()) == list(ids)


def test_ids_that_disagree_fit_nothing(
    ours: Path, aux: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save(tmp_path / "v.safetensors", *aux)
    assert run("--compare", ours, other, "--ids", "3,6,10") == 1
    shown = capsys.readouterr().out
    assert "does not fit: expected one offset id - block for all states, found [0, 1]" in shown
    assert "taps" not in shown
    assert run("--compare", ours, other, "--ids", "3,6,11", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["offset"], printed["taps"]["10"], printed["matches"][2]["offset"]) == (1, 11, 1)


@pytest.mark.parametrize("blocks", [(2, 5, 10), (5,), (5, 6, 7), (0, 1, 2)])
def test_places_are_no_ids(ours: Path, tmp_path: Path, blocks: tuple[int, ...]) -> None:
    """Neighbouring blocks would have one offset, which says nothing."""
    tensors = load_file(ours)
    states = torch.stack([tensors[f"hidden_states.{block}"] for block in blocks], dim=1)
    found = compare_files(ours, save(tmp_path / "v.safetensors", tensors["token_ids"], states))
    assert (found.fits, found.taps) == (False, {})
    assert found.verdict.endswith(f"found only places; give --ids. Blocks: {list(blocks)}")


def zeros(states: Tensor) -> None:
    states[:, 1] = 0


def some_zeros(states: Tensor) -> None:
    states[16:32, 1] = 0


def nan(states: Tensor) -> None:
    states[7, 1, 3] = float("nan")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [(zeros, "all zeros"), (some_zeros, "16 of {} rows are all zeros"), (nan, "NaN or infinity in 1 of {} rows")],
)
def test_states_that_are_none_are_named(
    ours: Path, aux: tuple[Tensor, Tensor], tmp_path: Path, break_it: Callable[[Tensor], None], message: str
) -> None:
    ids, states = aux[0], aux[1].clone()
    break_it(states)
    found = compare_files(ours, save(tmp_path / "v.safetensors", ids, states), ids=AUX_IDS)
    assert problems(found) == {"hidden_states[1]": message.format(len(ids))}
    assert (found.fits, found.offset) == (False, 1)
    assert found.verdict == "does not fit: engine id = block + 1 holds for 2 of 3 states"


def test_a_massive_row_hides_nothing(ours: Path, tmp_path: Path) -> None:
    """In the norm alone the noise in all rows but one would be within the tolerance."""
    tensors = load_file(ours)
    tensors["hidden_states.5"][0] *= 1e6
    mine = rewrite(ours, tmp_path / "ours.safetensors", tensors)
    states = torch.stack([tensors[f"hidden_states.{layer}"] for layer in LAYERS], dim=1)
    other = tmp_path / "v.safetensors"
    assert compare_files(mine, save(other, tensors["token_ids"], states), ids=AUX_IDS).fits
    states[1:, 1] = torch.randn(states[1:, 1].shape, generator=torch.Generator().manual_seed(0))
    found = compare_files(mine, save(other, tensors["token_ids"], states), ids=AUX_IDS)
    assert (found.matches[1].difference or 1.0) < 0.05
    assert problems(found) == {"hidden_states[1]": "no block within 0.05"}


def test_norm_and_cosine_have_to_agree(ours: Path, tmp_path: Path) -> None:
    """A massive row of block 5, and every other row of block 4."""
    tensors = load_file(ours)
    tensors["hidden_states.5"][0] *= 1e6
    mine = rewrite(ours, tmp_path / "ours.safetensors", tensors)
    mixed = tensors["hidden_states.5"].clone()
    mixed[1:] = tensors["hidden_states.4"][1:]
    other = tmp_path / "other.safetensors"
    save_file({"token_ids": tensors["token_ids"], "hidden_states.6": mixed}, other)
    (match,) = compare_files(mine, other).matches
    assert match.best == "block 5"
    assert (match.problem or "").startswith("ambiguous: by cosine block 4 is nearer (0.99")


def test_a_dumps_final_norm_has_to_be_one(ours: Path, tmp_path: Path) -> None:
    tensors = load_file(ours)
    tensors["final_norm"] = tensors["hidden_states.11"].clone()
    found = compare_files(ours, rewrite(ours, tmp_path / "other.safetensors", tensors))
    assert problems(found) == {"final_norm": "expected the state after the final norm, found block 11"}
    assert not found.fits


def test_another_version_is_refused(ours: Path, tmp_path: Path) -> None:
    other = rewrite(ours, tmp_path / "other.safetensors", load_file(ours), version=99)
    with pytest.raises(InputError, match="expected a dump of version 1, found 99"):
        compare_files(other, ours)


def test_random_states_fit_nothing(ours: Path, aux: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """The negative control, with the norms of real states."""
    ids, states = aux
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)) * states.float().std()
    other = save(tmp_path / "v.safetensors", ids, noise)
    assert run("--compare", ours, other, "--ids", "3,6,11") == 1
    found = compare_files(ours, other, ids=AUX_IDS)
    assert found.offset is None
    assert set(problems(found).values()) == {"no block within 0.05"}
    assert found.verdict == "does not fit: none of the 3 states is the output of one of our blocks"


def test_tolerance_decides(ours: Path, aux: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    other = save(tmp_path / "v.safetensors", *aux)
    assert not compare_files(ours, other, ids=AUX_IDS, tolerance=1e-5).fits
    with pytest.raises(InputError, match="--tolerance: expected a number between 0 and 1, found 0"):
        compare_files(ours, other, ids=AUX_IDS, tolerance=0)


def test_two_states_of_one_block_disagree(ours: Path, aux: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """An engine that captures the same state for two ids."""
    ids, states = aux
    found = compare_files(ours, save(tmp_path / "v.safetensors", ids, states[:, [0, 1, 1]]), ids=AUX_IDS)
    assert (found.fits, found.offset) == (False, None)
    assert "found [1, 6]" in found.verdict


def test_axes_are_told_by_the_tokens(ours: Path, aux: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    ids, states = aux
    other = save(tmp_path / "v.safetensors", ids, states.transpose(0, 1))
    assert compare_files(ours, other, ids=AUX_IDS).offset == 1
    with pytest.raises(InputError, match=r"expected one axis of hidden_states \[2, 3, 256\] to count the 310.* none"):
        read_states(save(other, ids, states[:2]))
    with pytest.raises(InputError, match=r"expected states \[L, H\] .* with L = 310"):
        read_states(save(other, ids, states), layer_axis=0)
    with pytest.raises(InputError, match=r"expected hidden_states \[N, L, H\] or \[L, N, H\]"):
        read_states(save(other, ids, states.flatten(1)))


def test_ambiguous_axes_need_the_flag(tmp_path: Path) -> None:
    """As many tokens as layers: 4 of each, of a verifier with 4 blocks."""
    model = save_model(tmp_path / "llama", "llama")
    mine = dump(tmp_path / "ours.safetensors", verifier=model, layers=(0, 2), token_ids=(5, 6, 7, 8))
    tensors = load_file(mine)
    stack = torch.stack([tensors[f"hidden_states.{block}"] for block in range(4)], dim=1)
    other = save(tmp_path / "v.safetensors", tensors["token_ids"], stack)
    for ids in (None, (1, 2, 3, 4)):
        with pytest.raises(InputError, match="two that may; say with --axis 0 or --axis 1"):
            compare_files(mine, other, ids=ids)
    assert compare_files(mine, other, ids=(1, 2, 3, 4), layer_axis=1).fits
    assert not compare_files(mine, other, ids=(1, 2, 3, 4), layer_axis=0).fits
    save(other, tensors["token_ids"], stack[:, :3])  # 3 layers, or 3 rows of 4 tokens: the ids settle it
    assert compare_files(mine, other, ids=(1, 2, 3)).fits
    with pytest.raises(InputError, match="two that may"):
        compare_files(mine, other)


def test_a_missing_last_row_is_said(ours: Path, aux: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    ids, states = aux
    other = tmp_path / "v.safetensors"
    found = compare_files(ours, save(other, ids, states[:-1]), ids=AUX_IDS)
    assert (found.fits, found.rows) == (True, len(ids) - 1)
    assert found.notes == [
        "compared over the first 309 tokens: ours has 310, the other 310, and states of 309: the last token is missing"
    ]
    found = compare_files(ours, save(other, ids[:-1], states[:-1]), ids=AUX_IDS)
    assert found.notes == ["compared over the first 309 tokens: ours has 310, the other 309"]
    longer = save(other, torch.cat([ids, ids[:4]]), torch.cat([states, states[:4]]))
    found = compare_files(ours, longer, ids=AUX_IDS)
    assert (found.fits, found.rows) == (True, len(ids))
    with pytest.raises(InputError, match="to count the 310 token ids"):
        compare_files(ours, save(other, ids, states[:-2]), ids=AUX_IDS)


def test_what_can_not_be_compared_is_refused(ours: Path, aux: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    ids, states = aux
    other = tmp_path / "v.safetensors"
    changed = ids.clone()
    changed[7] += 1
    with pytest.raises(InputError, match=rf"another at position 7: {changed[7]} instead of {ids[7]} \(1 of 310 differ"):
        compare_files(ours, save(other, changed, states))
    with pytest.raises(InputError, match=r"expected hidden size 256 as in .*, found \[128\]"):
        compare_files(ours, save(other, ids, states[..., :128]))
    with pytest.raises(InputError, match=r"expected token_ids \[L\], int32 or int64"):
        compare_files(ours, save(other, ids[:0], states))
    with pytest.raises(InputError, match="expected --ids for the 3 layers"):
        compare_files(ours, save(other, ids, states), ids=(3, 6))
    with pytest.raises(InputError, match="expected a dump that"):
        compare_files(other, ours)
    with pytest.raises(InputError, match="--ids and --axis are about one stacked tensor"):
        compare_files(ours, ours, ids=AUX_IDS)
    save_file({"hidden_states": states}, other)
    with pytest.raises(InputError, match=r"expected `token_ids` \[L\] beside the states, found hidden_states"):
        compare_files(ours, other)
    save_file({"token_ids": ids, "logits": states}, other)
    with pytest.raises(InputError, match=r"expected tensors hidden_states\.0"):
        compare_files(ours, other)
    save_file({"token_ids": ids, "hidden_states": states, "hidden_states.3": states[:, 0].contiguous()}, other)
    with pytest.raises(InputError, match="found both"):
        compare_files(ours, other)


def test_files_that_are_no_safetensors_are_refused(ours: Path, tmp_path: Path) -> None:
    """Nothing in a pickle is run."""
    target = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (target,))

    pickled = tmp_path / "states.pt"
    pickled.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"expected a safetensors file.*pickle files"):
        compare_files(ours, pickled)
    torch.save({"hidden_states": torch.zeros(2, 2)}, pickled)
    with pytest.raises(InputError, match=r"expected a safetensors file.*pickle files"):
        compare_files(ours, pickled)
    assert not target.exists()
    pickled.write_bytes(ours.read_bytes()[:-100])
    with pytest.raises(InputError, match="expected a safetensors file"):
        compare_files(ours, pickled)
    with pytest.raises(InputError, match="found nothing there"):
        compare_files(ours, tmp_path / "none")
    with pytest.raises(InputError, match="expected a safetensors file"):
        compare_files(ours, tmp_path)


def test_any_causal_lm_can_be_dumped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_model(tmp_path / "llama", "llama")
    flags = ("--verifier", model, "--layers", "0,2", "--token-ids", "5,6,7,8,9,10")
    assert run(*flags, "--output", tmp_path / "a") == 0
    assert "14 states" not in capsys.readouterr().out
    assert run(*flags, "--output", tmp_path / "b", "--source", "transformers") == 0
    found = compare_files(tmp_path / "a", tmp_path / "b")
    assert (found.fits, found.offset, found.rows) == (True, 0, 6)
    assert read_states(tmp_path / "a").details["ssm"] is None  # type: ignore[index]
    assert run(*flags, "--output", tmp_path / "c", "--only-layers", "--compute-dtype", "bfloat16") == 0
    few = load_file(tmp_path / "c")
    assert few.keys() == {"token_ids", "hidden_states.0", "hidden_states.2"}
    assert few["hidden_states.0"].dtype == torch.bfloat16
    found = compare_files(tmp_path / "c", tmp_path / "a")
    assert found.notes == ["ours holds no output of block 1, 3: nothing can match those"]


def test_text_becomes_the_tokenizers_ids(tmp_path: Path) -> None:
    path = dump(tmp_path / "a", text="The store is read.")
    assert 3 <= len(load_file(path)["token_ids"]) <= 12
    assert json.loads(DEMO.joinpath("config.json").read_text())["bos_token_id"] not in load_file(path)["token_ids"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ()}, "--layers: expected ascending"),
        ({"layers": (5, 2)}, "--layers: expected ascending"),
        ({"layers": (2, 12)}, r"--layers: expected blocks 0 \.\. 11"),
        ({"layers": (2, 11), "source": "transformers"}, r"expected blocks 0 \.\. 10, found 11.*after the final norm"),
        ({"token_ids": (1, 4096)}, r"--token-ids: expected ids 0 \.\. 4095"),
        ({"text": ""}, "expected at least one token"),
        ({"output": DEMO / "config.json"}, "expected a new file"),
        ({"verifier": DEMO.parent}, "expected a tokenizer"),
    ],
)
def test_dumps_that_can_not_be_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dump(**({"path": tmp_path / "a"} | settings | ({"path": settings["output"]} if "output" in settings else {})))
    assert not any(tmp_path.iterdir())


def test_states_that_are_not_finite_are_not_dumped(tmp_path: Path) -> None:
    model = save_model(tmp_path / "llama", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GateError, match=r"hidden_states\.1: expected finite states"):
        dump(tmp_path / "a", verifier=model, layers=(0,), token_ids=(5, 6))
    assert not (tmp_path / "a").exists()


def test_output_hidden_states_of_another_length_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_a_short_body(*arguments: Any, **named: Any) -> Any:
        short = SimpleNamespace(hidden_states=(torch.zeros(1, 2, HIDDEN),) * 3)
        return replace(load_verifier(*arguments, **named), body=lambda **_: short)

    monkeypatch.setattr("draftcache.tools.probe.dump.load_verifier", with_a_short_body)
    with pytest.raises(InputError, match="expected 13 entries of output_hidden_states, found 3"):
        dump(tmp_path / "a", source="transformers", token_ids=(5, 6))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--compare", "a", "b", "--layers", "2"), "--layers: expected --verifier beside it"),
        (("--compare", "a", "b", "--allow-fallback"), "--allow-fallback: expected --verifier"),
        (("--verifier", "a", "--ids", "2"), "--ids: expected --compare beside it"),
        (("--verifier", "a", "--tolerance", "0.1"), "--tolerance: expected --compare"),
        (("--verifier", "a", "--layers", "2"), "--output: expected beside --verifier"),
        (("--verifier", "a", "--layers", "2,x", "--output", "b"), "--layers: expected numbers"),
        (("--compare", "a", "b", "--ids", "6,3"), "--ids: expected ascending"),
    ],
)
def test_flags_that_do_not_go_together(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*flags)


def test_comparing_needs_no_torch(ours: Path) -> None:
    code = f"""
import sys
from draftcache.tools.cli import main
assert main(["probe", "--compare", {str(ours)!r}, {str(ours)!r}]) == 0
assert main(["probe", "--compare", {str(ours)!r}, {str(ours)!r}, "--axis", "0"]) == 2
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "draftcache probe: error: " in result.stderr
