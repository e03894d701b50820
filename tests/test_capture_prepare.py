from __future__ import annotations

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.capture.prepare import chunks as prepare_chunks
from draftcache.capture.prepare import job as prepare_job
from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.chunks import Chunk
from draftcache.capture.prepare.job import PrepareConfig, PrepareResult, prepare
from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.format.vocab_map import VocabMap
from draftcache.tools.cli import main
from support.chat_tokenizers import CHATML, TOKENIZER_TEXT, save_tokenizer
from support.log_lines import without_times
from support.paths import ROOT


def chat(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Each row as one line of JSON; bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def random_rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    choose = random.Random(seed)
    words = "".join(TOKENIZER_TEXT).split(" ")
    return [chat(*(" ".join(choose.choices(words, k=choose.randrange(1, 30))) for _ in range(4))) for _ in range(count)]


def run(tokenizer: Path, output: Path, splits: dict[str, list[Path]], **settings: Any) -> PrepareResult:
    settings = {"held_out": {}, "workers": 1, "progress": False, **settings}
    return prepare(PrepareConfig(tokenizer=tokenizer, output=output, splits=splits, **settings))


def quarantine_of(output: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / split / "quarantine.jsonl").read_text().splitlines()]


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


ROWS_THAT_ENDED_JOBS = {
    "huge-id": (b'{"token_ids": [' + b"9" * 5000 + b'], "loss_mask": [1]}', "malformed-json"),
    "deep-tools": (chat("hi", "yo") | {"tools": "[" * 100_000 + "]" * 100_000}, "bad-tools"),
    "deep-row": (b"[" * 100_000 + b"]" * 100_000, "malformed-json"),
    "surrogate": (b'{"messages": [{"role": "\\ud800", "content": 1}]}', "unknown-role"),
}


@pytest.mark.parametrize(("row", "reason"), ROWS_THAT_ENDED_JOBS.values(), ids=ROWS_THAT_ENDED_JOBS)
def test_a_row_that_once_ended_the_job_is_set_aside_and_its_neighbours_are_kept(
    tmp_path: Path, tokenizer_dir: Path, row: Any, reason: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a", "b"), row, chat("c", "it must survive")])
    run(tokenizer_dir, tmp_path / "out", {"train": [rows]})
    assert len(TokenDataset.open(tmp_path / "out").split("train")) == 2
    (record,) = quarantine_of(tmp_path / "out", "train")
    assert (record["line"], record["reason"]) == (2, reason)


def test_ids_and_masks_are_those_of_transformers(tokenizer_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    rows = [*random_rows(20), chat("hi 🎉", "👩‍👩‍👧")]
    max_length = 60
    result = run(
        tokenizer_dir, tmp_path / "out", {"a": [write_rows(tmp_path / "a.jsonl", rows)]}, max_length=max_length
    )
    split = TokenDataset.open(tmp_path / "out").split("a")
    whole = []
    for index, row in enumerate(rows):
        expected = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        ids, mask, _ = split[index]
        assert ids.tolist() == expected["input_ids"][:max_length]
        assert mask.tolist() == [bool(m) for m in expected["assistant_masks"][:max_length]]
        whole.append(len(expected["input_ids"]))
    record = result.manifest["splits"]["a"]
    assert record["untruncated_tokens"] == sum(whole)
    assert record["tokens"] == sum(min(length, max_length) for length in whole)
    assert record["truncated_rows"] == sum(length > max_length for length in whole) > 0
    assert record["loss_tokens"] == int(split.loss_mask.sum()) == int(split.token_counts.sum())
    assert split.conversations["untruncated_tokens"].tolist() == whole
    assert np.array_equal(
        split.token_counts, np.bincount(split.token_ids[split.loss_mask], minlength=len(split.token_counts))
    )


def test_output_does_not_depend_on_the_number_of_workers(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_chunks, "CHUNK_BYTES", 4000)
    rows: list[Any] = random_rows(200)
    rows[50], rows[51], rows[120] = b"broken", rows[52], chat("only a user")
    inputs = {
        "a": [write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", random_rows(90, 2))],
        "c": [write_rows(tmp_path / "c.jsonl", random_rows(40, 3))],
    }
    chunks = list(prepare_chunks.read_chunks("a", 0, inputs["a"][0]))
    assert len(chunks) > 10
    for workers in (1, 3):
        run(tokenizer_dir, tmp_path / str(workers), inputs, workers=workers, draft_vocab_size=100)
    one, three = files_of(tmp_path / "1"), files_of(tmp_path / "3")
    assert one.keys() == three.keys()
    assert len(one) == 13
    for name in one:
        assert one[name] == three[name], name
    split = TokenDataset.open(tmp_path / "3").split("a")
    assert split.conversations["source_file"].tolist() == [0] * 198 + [1] * 90
    assert split.conversations["source_line"].tolist()[195:200] == [198, 199, 200, 1, 2]


def test_bad_rows_are_quarantined_and_good_ones_kept(tokenizer_dir: Path, tmp_path: Path) -> None:
    good = chat("hi", "hello there")
    vocab_size = 449
    bad: list[tuple[Any, str]] = [
        (b'{"messages": [', "malformed-json"),
        (b'{"messages": "\xff\xfe"}', "invalid-utf8"),
        ({"messages": []}, "empty-conversation"),
        ({"messages": [{"role": "assistant", "content": "first"}]}, "template-rejected"),
        (chat("nobody answers"), "no-assistant-tokens"),
        ({"token_ids": [1, vocab_size], "loss_mask": [0, 1]}, "token-id-out-of-vocabulary"),
        ({"token_ids": [1, 2, 3], "loss_mask": [0, 1]}, "length-mismatch"),
        ({"token_ids": [1, 2, 3], "loss_mask": [0, 0, 0]}, "no-assistant-tokens"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "unknown-role"),
        (chat("a very long question " * 30, "cut off"), "no-assistant-tokens-after-truncation"),
        (chat("q", "half an emoji \ud83d"), "lone-surrogate"),
        ({"prompt": "x"}, "unknown-form"),
    ]
    rows = [good, *(row for pair in bad for row in (pair[0], good))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    result = run(tokenizer_dir, tmp_path / "out", {"train": [path]}, max_length=100)
    assert result.manifest["vocab_size"] == vocab_size
    records = quarantine_of(tmp_path / "out", "train")
    assert [(record["line"], record["reason"]) for record in records] == [
        (2 * number + 2, reason) for number, (_, reason) in enumerate(bad)
    ]
    assert all(record["file"] == str(path) and record["expected"] and record["found"] for record in records)
    assert "449" in records[5]["found"]
    assert "user or system turn" in records[3]["found"]
    accounting = result.manifest["splits"]["train"]
    assert (accounting["rows"], accounting["quarantined_rows"]) == (len(bad) + 1, len(bad))
    assert accounting["duplicate_rows"] == len(bad)
    assert accounting["quarantined_by_reason"]["no-assistant-tokens"] == 2
    split = TokenDataset.open(tmp_path / "out").split("train")
    assert split.conversations["source_line"].tolist() == list(range(1, 2 * len(bad) + 2, 2))
    assert len({split[index][2] for index in range(len(split))}) == 1


def test_a_cut_gzip_file_keeps_its_rows(tokenizer_dir: Path, tmp_path: Path) -> None:
    data = gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in random_rows(300)))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    result = run(tokenizer_dir, tmp_path / "out", {"train": [path]})
    (record,) = quarantine_of(tmp_path / "out", "train")
    rows = result.manifest["splits"]["train"]["rows"]
    assert 50 < rows < 250
    assert (record["reason"], record["line"], record["file"]) == ("damaged-file", rows + 1, str(path))


def test_pre_tokenised_rows_are_taken_as_they_are(tokenizer_dir: Path, tmp_path: Path) -> None:
    # "a" + "b" as two tokens: encoding the text again could merge them.
    row = {"token_ids": [70, 71, 1], "loss_mask": [0, 1, True], **chat("ignored", "ignored")}
    run(tokenizer_dir, tmp_path / "out", {"traces": [write_rows(tmp_path / "t.jsonl", [row])]}, max_length=2)
    ids, mask, _ = TokenDataset.open(tmp_path / "out").split("traces")[0]
    assert (ids.tolist(), mask.tolist()) == ([70, 71], [False, True])


def test_rows_of_token_ids_need_no_template(tmp_path: Path) -> None:
    """A tokenizer without a chat template is refused for conversations, and for them alone."""
    bare = save_tokenizer(tmp_path / "bare", None)
    tokens = [{"token_ids": [70, 71, number], "loss_mask": [0, 1, 1]} for number in range(70)]
    rows = write_rows(tmp_path / "rows.jsonl", [*tokens, chat("late", "conversation")])
    manifest = run(bare, tmp_path / "out", {"traces": [rows]}).manifest
    assert manifest["chat_template"]["source"] == "none"
    assert len(TokenDataset.open(tmp_path / "out").split("traces")) == 70
    (record,) = quarantine_of(tmp_path / "out", "traces")
    assert record["line"] == 71
    assert "no template was needed; give one" in record["found"]
    mixed = write_rows(tmp_path / "mixed.jsonl", [tokens[0], chat("early", "conversation")])
    with pytest.raises(InputError, match="expected a chat template, found none"):
        run(bare, tmp_path / "mixed", {"traces": [mixed]})


def test_when_no_row_has_an_answer_the_split_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [chat("only a question")] * 5)
    with pytest.raises(InputError, match=r"split train: .* 5, all set aside .*rows.jsonl:1: .*are the roles right"):
        run(tokenizer_dir, tmp_path / "out", {"train": [path]})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out.*"))


def test_tags_that_are_not_there_are_refused(untagged_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", random_rows(2))
    with pytest.raises(InputError, match=r"--loss-mask tags: expected a \{% generation %\} block"):
        run(untagged_tokenizer_dir, tmp_path / "out", {"train": [path]}, chat=ChatSettings(loss_mask="tags"))


def test_splits_without_usable_rows_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    good = write_rows(tmp_path / "good.jsonl", random_rows(3))
    empty = write_rows(tmp_path / "empty.jsonl", [])
    broken = write_rows(tmp_path / "broken.jsonl", [b"x", chat("only a user")])
    with pytest.raises(InputError, match="split b: expected at least one row, found none"):
        run(tokenizer_dir, tmp_path / "out", {"a": [good], "b": [empty]})
    with pytest.raises(InputError, match=r"split b: .* found 2, all set aside .*broken.jsonl:1: malformed") as caught:
        run(tokenizer_dir, tmp_path / "out", {"a": [good], "b": [broken]})
    assert "roles right" not in str(caught.value)
    with pytest.raises(InputError, match=r"none\.jsonl"):
        run(tokenizer_dir, tmp_path / "out", {"a": [tmp_path / "none.jsonl"]})


def test_given_template_must_render_the_own_ones_text(untagged_tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", random_rows(5))
    inputs = {"train": [path]}
    template = tmp_path / "mine.jinja"
    template.write_text(CHATML)
    result = run(untagged_tokenizer_dir, tmp_path / "same", inputs, chat_template=template)
    assert result.manifest["chat_template"]["matched"].startswith(
        "compared with the tokenizer's own template on every row"
    )
    template.write_text(CHATML.replace("'<|im_end|>'", "' <|im_end|>'", 1))
    with pytest.raises(InputError, match=r"rows.jsonl:1: at character \d+ .*--allow-template-difference"):
        run(untagged_tokenizer_dir, tmp_path / "other", inputs, chat_template=template)
    assert not (tmp_path / "other").exists()
    result = run(
        untagged_tokenizer_dir, tmp_path / "other", inputs, chat_template=template, allow_template_difference=True
    )
    assert result.manifest["chat_template"]["matched"].startswith("differs")
    hashes = {TokenDataset.open(tmp_path / name).chat_template_hash for name in ("same", "other")}
    assert len(hashes) == 2


def test_a_tokenizer_that_does_more_than_its_backend_is_refused(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    whole = PreTrainedTokenizerFast.apply_chat_template

    def one_more(self: Any, *arguments: Any, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [0, *whole(self, *arguments, **settings)["input_ids"]]}

    monkeypatch.setattr(PreTrainedTokenizerFast, "apply_chat_template", one_more)
    path = write_rows(tmp_path / "rows.jsonl", random_rows(3))
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*apply_chat_template"):
        run(tokenizer_dir, tmp_path / "out", {"train": [path]})


def test_vocabulary_map_counts_splits_but_not_held_out_ones(tokenizer_dir: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "a.jsonl", [chat("q", "aaaa bbbb")])
    dev = write_rows(tmp_path / "d.jsonl", [chat("q", "東京 東京 東京 東京")])
    result = run(tokenizer_dir, tmp_path / "out", {"a": [train]}, held_out={"dev": [dev]}, draft_vocab_size=40)
    dataset = TokenDataset.open(tmp_path / "out")
    assert (dataset.splits, dataset.held_out) == (("a", "dev"), ("dev",))
    vocab_map = VocabMap.load(tmp_path / "out" / "vocab_map.safetensors")
    assert (len(vocab_map), vocab_map.vocab_size) == (40, dataset.vocab_size)
    assert result.manifest["draft_vocabulary"]["hash"] == vocab_map.hash
    coverage = {row["name"]: row for row in result.manifest["draft_vocabulary"]["coverage"]}
    assert list(coverage) == ["a", "union", "dev"]
    assert coverage["a"]["fraction"] == coverage["union"]["fraction"] == 1.0
    assert coverage["dev"]["fraction"] < 0.9
    with pytest.raises(InputError, match="draft vocabulary size"):
        run(tokenizer_dir, tmp_path / "big", {"a": [train]}, draft_vocab_size=dataset.vocab_size + 1)
    assert not (tmp_path / "big").exists()


def test_the_same_job_again_is_a_no_op_and_another_one_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", random_rows(5))
    output = tmp_path / "out"
    first = run(tokenizer_dir, output, {"train": [path]})
    inode = output.stat().st_ino
    again = run(tokenizer_dir, output, {"train": [path.rename(tmp_path / "renamed.jsonl")]}, workers=2)
    assert (first.reused, again.reused, output.stat().st_ino) == (False, True, inode)
    assert again.manifest == first.manifest
    inputs = {"train": [tmp_path / "renamed.jsonl"]}
    with pytest.raises(InputError, match="other inputs or settings"):
        run(tokenizer_dir, output, inputs, max_length=50)
    assert TokenDataset.open(output).manifest == first.manifest
    assert run(tokenizer_dir, output, inputs, max_length=50, overwrite=True).manifest["max_length"] == 50


def test_a_damaged_dataset_is_no_no_op(tokenizer_dir: Path, tmp_path: Path) -> None:
    inputs = {"train": [write_rows(tmp_path / "rows.jsonl", random_rows(5))]}
    run(tokenizer_dir, tmp_path / "out", inputs)
    (tmp_path / "out" / "train" / "loss_mask.npy").unlink()
    with pytest.raises(InputError, match="--overwrite"):
        run(tokenizer_dir, tmp_path / "out", inputs)
    run(tokenizer_dir, tmp_path / "out", inputs, overwrite=True)
    TokenDataset.open(tmp_path / "out").verify()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"max_length": 1}, "--max-length: expected at least 2, found 1"),
        ({"draft_vocab_size": 0}, "--draft-vocab-size: expected at least 1"),
        ({"workers": -1}, "--workers"),
        ({"splits": {}}, "expected at least one NAME=INPUT"),
        ({"held_out": {"train": []}}, r"found \['train'\] in both"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=found):
        PrepareConfig(
            **{"tokenizer": tmp_path, "output": tmp_path, "splits": {"train": []}, "held_out": {}, **settings}
        )


def die(chunk: Chunk) -> None:
    Path(chunk.file).with_suffix(".reached").touch()
    os._exit(3)


def test_a_dead_worker_is_an_error_and_leaves_nothing(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_job, "run_in_worker", die)
    inputs = {"train": [write_rows(tmp_path / "rows.jsonl", random_rows(5))]}
    with pytest.raises(DraftcacheError, match="a worker process died"):
        run(tokenizer_dir, tmp_path / "out", inputs, workers=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rows.jsonl", "rows.reached"]


def test_command_line_end_to_end(tokenizer_dir: Path, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [*random_rows(20), b"broken"])
    second = write_rows(tmp_path / "b.jsonl", random_rows(7, 2))
    command = [sys.executable, "-m", "draftcache.tools.cli", "prepare", "--tokenizer", str(tokenizer_dir)]
    command += ["--output", str(tmp_path / "out"), "--max-length", "80", "--draft-vocab-size", "200", "--workers", "2"]
    third = write_rows(tmp_path / "c.jsonl", random_rows(7, 3))
    command += ["--held-out", f"dev={third}", f"train={first}", f"train={second}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "| Rows / conversations " in done.stdout
    assert "dev (held out)" in done.stdout
    assert "train: 1 x malformed-json (3.57% of 28 rows), first " in done.stdout
    assert "Coverage by top 200" in done.stdout
    assert "1 rows were quarantined" in done.stderr
    manifest = TokenDataset.open(tmp_path / "out").manifest
    assert manifest["splits"]["train"]["rows"] == 27
    assert len(manifest["splits"]["train"]["sources"]) == 2
    assert manifest["splits"]["dev"]["rows"] == 7
    refused = subprocess.run([*command, "--max-length", "81"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert without_times(refused.stderr).startswith("draftcache prepare: error: --output")
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    "pair", ["rows.jsonl", "=rows.jsonl", "a=", "../a=rows.jsonl", "union=rows.jsonl", "tokenizer.json=rows.jsonl"]
)
def test_bad_split_names_are_refused(pair: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "--tokenizer", str(tmp_path), "--output", str(tmp_path / "out"), pair]) == 2
    assert "expected NAME=INPUT" in capsys.readouterr().err


def test_parsing_imports_nothing_heavy() -> None:
    code = (
        "import sys, argparse, capture, tools.commands.prepare as p, tools.commands.vocab as v\n"
        "p.add_arguments(argparse.ArgumentParser()); v.add_arguments(argparse.ArgumentParser())\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_sigkill_leaves_nothing_that_opens(tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", random_rows(400) * 150)
    command = [sys.executable, "-m", "draftcache.tools.cli", "prepare", "--tokenizer", str(tokenizer_dir)]
    command += ["--output", str(tmp_path / "out"), "--workers", "2", f"train={rows}"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size > 100_000 for path in tmp_path.glob(".out.*.partial/train/token_ids.npy")):
        assert process.poll() is None, "prepare ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"manifest\.json"):
        TokenDataset.open(next(tmp_path.glob(".out.*.partial")))
    wait_for_group(process.pid)  # the workers notice and go
    small = write_rows(tmp_path / "small.jsonl", random_rows(5))
    run(tokenizer_dir, tmp_path / "out", {"other": [small]})
    TokenDataset.open(tmp_path / "out").verify()
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["manifest.json", "other", "tokenizer.json"]
    assert not list(tmp_path.glob(".out.*"))


def wait_for_group(group: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        states = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, found = stat.read_text().rpartition(")")[2].split()[:3]
            except (OSError, ValueError):
                continue
            if int(found) == group and state != "Z":
                states.append(stat)
        if not states:
            return
        time.sleep(0.05)
    raise AssertionError(f"processes of the killed run are still there: {states}")


# --- draftcache vocab ---


def prepared(tokenizer: Path, tmp_path: Path, name: str, *contents: str, **settings: Any) -> Path:
    rows = write_rows(tmp_path / f"{name}.jsonl", [chat("q", text) for text in contents])
    run(tokenizer, tmp_path / name, {"train": [rows]}, **settings)
    return tmp_path / name


def test_vocab_is_the_union_of_prepared_datasets(
    tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepared(tokenizer_dir, tmp_path, "one", "the fox the fox")
    held_out = {"dev": [write_rows(tmp_path / "dev.jsonl", [chat("q", "日本語")])]}
    second = prepared(tokenizer_dir, tmp_path, "two", "東京 東京", held_out=held_out)
    output = tmp_path / "map.safetensors"
    assert main(["vocab", "--size", "30", "--output", str(output), str(first), f"{second}:train"]) == 0
    printed = capsys.readouterr().out
    assert "one:train" in printed
    assert "two:train" in printed
    vocab_map = VocabMap.load(output)
    assert vocab_map.sources == ("one:train", "two:train")
    counts = [TokenDataset.open(path).split("train").token_counts for path in (first, second)]
    seen = np.flatnonzero(counts[0] + counts[1])
    assert set(seen) <= set(vocab_map.target_ids.tolist())
    assert main(["vocab", "--size", "30", "--output", str(output), str(first), str(second)]) == 0
    assert VocabMap.load(output).hash == vocab_map.hash  # held-out splits are not counted unless named


def test_vocab_refusals(tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = prepared(tokenizer_dir, tmp_path, "one", "the fox")
    other_tokenizer = save_tokenizer(tmp_path / "tokenizer", CHATML, vocab_size=300)
    foreign = prepared(other_tokenizer, tmp_path, "foreign", "the fox")
    output = tmp_path / "map.safetensors"

    def refusal(*arguments: str) -> str:
        assert main(["vocab", "--output", str(output), *arguments]) == 2
        return capsys.readouterr().err

    assert "tokenizer_hash: expected" in refusal("--size", "9", str(first), str(foreign))
    assert "one:train twice" in refusal("--size", "9", str(first), f"{first}:train")
    assert "found 'dev'" in refusal("--size", "9", f"{first}:dev")
    assert "found no manifest.json" in refusal("--size", "9", str(tmp_path))
    assert "expected 1..449" in refusal("--size", "450", str(first))
    assert not output.exists()
    assert main(["vocab", "--output", str(output), "--size", "9", str(first)]) == 0
    kept = VocabMap.load(output).hash
    assert f"found map {kept}" in refusal("--size", "10", str(first))
    assert VocabMap.load(output).hash == kept
    assert main(["vocab", "--output", str(output), "--size", "10", "--overwrite", str(first)]) == 0
    assert len(VocabMap.load(output)) == 10


def test_a_file_that_is_trained_on_is_not_held_out(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A copy under another name is the same rows. Within one split a file may be named twice, to weigh it double."""
    rows = write_rows(tmp_path / "rows.jsonl", [chat("a", "b")])
    copy = write_rows(tmp_path / "copy.jsonl", [chat("a", "b")])
    with pytest.raises(InputError, match=r"--held-out val=.*copy\.jsonl: .* the same bytes as train=.*rows\.jsonl"):
        run(tokenizer_dir, tmp_path / "out", {"train": [rows]}, held_out={"val": [copy]})
    other = write_rows(tmp_path / "other.jsonl", [chat("c", "d")])
    run(tokenizer_dir, tmp_path / "out", {"train": [rows, rows]}, held_out={"val": [other]})
