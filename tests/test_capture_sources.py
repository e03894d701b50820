from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from draftcache.capture.prepare.job import PrepareConfig, prepare
from draftcache.capture.prepare.rows.hub import download_dataset
from draftcache.capture.prepare.rows.sources import describe_sources, expand_input, refuse_shared_files
from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.store.common.errors import InputError
from draftcache.tools.cli import main
from draftcache.tools.commands.prepare import read_splits

ROW = {"token_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}
LINE = json.dumps(ROW).encode() + b"\n"


def write(path: Path, data: bytes = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def save_parquet(path: Path, rows: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.Table.from_pylist([ROW] * rows), path)
    return path


def save_to_disk(folder: Path, shards: int = 2, **state: Any) -> list[Path]:
    """Write what `datasets.Dataset.save_to_disk` writes, the shards in an order that is not that of their names."""
    names = [f"data-{number:05}-of-{shards:05}.arrow" for number in reversed(range(shards))]
    folder.mkdir(parents=True)
    for name in [*names, "cache-0123.arrow"]:
        table = pa.Table.from_pylist([ROW])
        with (folder / name).open("wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}, indent=2))
    content = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "01", "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(content, indent=2))
    return [folder / name for name in names]


def test_a_file_stands_for_itself_whatever_its_name(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "a*[b]?.txt", "no suffix"):
        path = write(tmp_path / name)
        assert expand_input(str(path)) == [path]


def test_a_folder_gives_all_its_readable_files_in_order(tmp_path: Path) -> None:
    expected = [
        write(tmp_path / "a" / "z.jsonl"),
        write(tmp_path / "b.txt", gzip.compress(LINE)),
        save_parquet(tmp_path / "c" / "d" / "0.parquet"),
        write(tmp_path / "e.json", b"[" + LINE + b"]"),
        write(tmp_path / "f", b"broken\n" + LINE * 2),
    ]
    write(tmp_path / "README.md", b'# Rows\n```\n{"messages": []}\n```\n')
    write(tmp_path / "template.jinja", b"{% for m in messages %}{{ m }}{% endfor %}\n")
    write(tmp_path / "settings.toml", b"[split]\nname = 1\n")
    write(tmp_path / "_SUCCESS", b"")
    write(tmp_path / "info.json", json.dumps({"a": 1}, indent=2).encode())
    write(tmp_path / "archive.zip", b"PK\x03\x04")
    write(tmp_path / ".hidden.jsonl")
    write(tmp_path / ".git" / "rows.jsonl")
    assert expand_input(str(tmp_path)) == expected
    assert [source["file"] for source in describe_sources(expected)] == list(map(str, expected))


def test_a_hidden_folder_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / ".cache" / "rows")
    assert expand_input(str(tmp_path / ".cache")) == [path]


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "README.md", b"# Rows\n")
    with pytest.raises(InputError, match=r"expected a folder with files of JSONL .*found none in 1 files"):
        expand_input(str(tmp_path))


def test_globs_are_sorted_and_recursive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write(tmp_path / name) for name in ("a.jsonl", "b/c.jsonl", "d.jsonl")]
    assert expand_input(str(tmp_path / "*.jsonl")) == [paths[0], paths[2]]
    assert expand_input(str(tmp_path / "**" / "[a-c].jsonl")) == paths[:2]
    assert expand_input(str(tmp_path / "*")) == [paths[0], paths[2]]
    monkeypatch.chdir(tmp_path)
    assert expand_input("?.jsonl") == [Path("a.jsonl"), Path("d.jsonl")]
    with pytest.raises(InputError, match=r"\*\.zst: expected a glob that matches files, found none"):
        expand_input(str(tmp_path / "*.zst"))


def test_a_missing_path_is_refused_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for text in ("rows.jsonl", "data/rows.jsonl", str(tmp_path / "rows"), "a/b/c.jsonl", "data/rows:train"):
        with pytest.raises(InputError, match=r"expected a file, a folder or a glob, found nothing there"):
            expand_input(text)


def test_a_saved_dataset_gives_the_shards_of_its_state_in_order(tmp_path: Path) -> None:
    shards = save_to_disk(tmp_path / "saved")
    assert expand_input(str(tmp_path / "saved")) == shards
    assert len(describe_sources(shards)) == 2


def test_a_saved_selection_is_refused(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(InputError, match=r"state.json: .*_indices_data_files.*flatten_indices\(\) and save it again"):
        expand_input(str(tmp_path / "saved"))
    save_to_disk(tmp_path / "other", _indices_data_files=None)
    assert len(expand_input(str(tmp_path / "other"))) == 2


def test_a_saved_dataset_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved")[0].unlink()
    with pytest.raises(InputError, match=r"all of its 2 files, found none at .*data-00001-of-00002"):
        expand_input(str(tmp_path / "saved"))
    for state, found in (
        (b"{", r"state\.json: expected JSON"),
        (b"[]", "expected a JSON object, found a list"),
        (b"{}", "expected `_data_files`"),
        (b'{"_data_files": []}', "expected at least one file"),
    ):
        (tmp_path / "saved" / "state.json").write_bytes(state)
        with pytest.raises(InputError, match=found):
            expand_input(str(tmp_path / "saved"))


def test_folders_of_several_saved_splits_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_to_disk(tmp_path / "saved" / split)
    with pytest.raises(InputError, match=r"a saved dataset inside: give NAME=.*saved/test"):
        expand_input(str(tmp_path / "saved"))
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(InputError, match=r"DatasetDict with the splits \['train', 'test'\].*NAME=.*saved/SPLIT"):
        expand_input(str(tmp_path / "saved"))


def snapshot(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Make the hub give this folder; returns the calls to come."""
    calls = []

    def snapshot_download(repo_id: str, **arguments: Any) -> str:
        calls.append({"repo_id": repo_id, **arguments})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save_parquet(tmp_path / "hub" / "default" / "train" / f"000{number}.parquet") for number in (1, 0)]
    val = save_parquet(tmp_path / "hub" / "default" / "val" / "0000.parquet")
    calls = snapshot(tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert expand_input("org/name") == sorted(paths)
    assert expand_input("org/name:val") == [val]
    assert expand_input("org/name:default/val") == [val]
    common = {"repo_id": "org/name", "repo_type": "dataset", "revision": "refs/convert/parquet"}
    assert calls == [
        {**common, "allow_patterns": pattern}
        for pattern in ("*/train/*.parquet", "*/val/*.parquet", "default/val/*.parquet")
    ]


def test_a_split_that_the_hub_does_not_have_or_has_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for config in ("main", "other"):
        save_parquet(tmp_path / "hub" / config / "train" / "0000.parquet")
    snapshot(tmp_path / "hub", monkeypatch)
    with pytest.raises(InputError, match=r"one configuration, found \['main', 'other'\]: give org/name:CONFIG/train"):
        download_dataset("org/name")
    with pytest.raises(InputError, match=r"\*/test/\*\.parquet .*found none.*hf download org/name"):
        download_dataset("org/name:test")
    with pytest.raises(InputError, match="expected ORG/NAME"):
        download_dataset("name")


@pytest.mark.parametrize("offline", [True, False])
def test_where_no_hub_is_reached_both_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        InputError,
        match=r"org/name: expected a file, a folder, a glob or a hub dataset, found nothing of that name here, and "
        r"the hub did not give the dataset: \w+: \w",
    ):
        expand_input("org/name")


def test_the_same_file_twice_in_a_split_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InputError, match=r"link: expected each file of a split once, found it as .*rows as well"):
        describe_sources([path, tmp_path / "link"])
    copy = write(tmp_path / "copy")
    assert len(describe_sources([path, copy])) == 2


def test_a_held_out_file_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    sources = {
        "train": describe_sources(expand_input(str(save_parquet(tmp_path / "a" / "0.parquet").parent))),
        "val": describe_sources([save_parquet(tmp_path / "0.parquet")]),
    }
    with pytest.raises(InputError, match=r"--held-out val=.* the same bytes as train="):
        refuse_shared_files(sources, held_out=["val"])


def test_splits_of_several_inputs(tmp_path: Path) -> None:
    paths = [write(tmp_path / name) for name in ("a/1", "a/2", "b", "c")]
    pairs = [f"train={tmp_path}/a", f"val={tmp_path}/c", f"train={tmp_path}/b"]
    assert read_splits(pairs) == {"train": paths[:3], "val": paths[3:]}


def test_prepare_takes_any_kind_of_file_and_names_of_roles(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The same rows in four kinds of files become the same conversations; a role's name is part of the job."""
    rows = [{"conversations": [{"from": "Q", "value": "hi"}, {"from": "A", "value": f"yes {n}"}]} for n in range(9)]
    table = pa.Table.from_pylist(rows)
    write(tmp_path / "in" / "0", b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    write(tmp_path / "in" / "1", gzip.compress(json.dumps(rows, indent=1).encode()))
    pa.parquet.write_table(table, tmp_path / "in" / "2")
    with (tmp_path / "in" / "3").open("wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    command = ["prepare", "--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "out"), f"train={tmp_path}/in"]
    assert main([*command, "--workers", "2", "--role", "q=user", "--role", "A=assistant"]) == 0
    split = TokenDataset.open(tmp_path / "out").split("train")
    assert split.conversations["source_file"].tolist() == sorted([*range(4)] * 9)
    assert split.conversations["source_line"].tolist() == [*range(1, 10)] * 4
    for number in range(9, 36):
        assert split[number][1].tolist() == split[number % 9][1].tolist()
    assert main([*command, "--role", "a=assistant", "--role", "Q=user"]) == 0
    assert main([*command, "--role", "a=user", "--role", "Q=assistant"]) == 2
    shutil.rmtree(tmp_path / "out")
    assert main(command) == 2


def test_refusals_come_before_any_work(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.zip", b"PK\x03\x04")
    with pytest.raises(InputError, match="a ZIP archive"):
        prepare(
            PrepareConfig(
                tokenizer=tokenizer_dir,
                output=tmp_path / "out",
                splits={"train": [write(tmp_path / "good"), path]},
                held_out={},
            )
        )
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--role"):
        PrepareConfig(
            tokenizer=tokenizer_dir, output=tmp_path / "out", splits={"train": [path]}, held_out={}, roles=("x",)
        )
