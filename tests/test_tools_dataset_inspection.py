"""`draftcache inspect` of a prepared dataset: decoding to the character, what is marked, refusals, older datasets."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from draftcache.capture.prepare.token_dataset import PreparedRow, TokenDataset
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.tools.cli import main
from draftcache.tools.reports.dataset_text import leakage_warnings
from draftcache.tools.reports.shown_conversation import (
    decode_pieces,
    describe_shown,
    format_shown,
    load_backend,
    show_samples,
    token_table,
)
from draftcache.tools.reports.terminal_text import quoted, shows_colour, visible
from support.chat_tokenizers import TOKENIZER_TEXT
from support.synthetic import write_store

TEXT = "<|im_start|>user\n  Ünï 東京 🎉👩‍👩‍👧 x<|im_end|>\n"
ARCHIVE = Path(__file__).parent / "recorded" / "written_by_2f810a2.tar.gz"


def sentencepiece_like() -> Tokenizer:
    """A tokenizer of Llama-2's kind: a space is part of a token, the first one is dropped, unknown text is bytes."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlowrt", "▁h", "ll"]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, [("▁", "h"), ("l", "l")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


@pytest.fixture(params=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_dir: Path) -> Tokenizer:
    return load_backend(tokenizer_dir) if request.param == "byte-level" else sentencepiece_like()


def shown(ids: list[int], mask: list[bool] | list[int], untruncated: int | None = None) -> PreparedRow:
    return PreparedRow(
        "train", "rows.jsonl", 17, np.array(ids, np.uint32), np.array(mask, np.bool_), untruncated or len(ids)
    )


def test_pieces_are_whole_characters_and_together_the_text(tokenizer: Tokenizer) -> None:
    for text in (TEXT, "hello  world", "🎉" * 20, "a", " lead", "".join(TOKENIZER_TEXT[:5]), "<s>hello <s> world"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces = list(decode_pieces(ids, tokenizer))
        assert "".join(piece for _, _, piece in pieces) == tokenizer.decode(ids, skip_special_tokens=False)
        assert not any("\ufffd" in piece for _, _, piece in pieces)
        assert [first for first, _, _ in pieces] == [0, *(last for _, last, _ in pieces[:-1])]
        assert pieces[-1][1] == len(ids)


def test_a_border_inside_a_character_shows_replacement_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a 龘 b", add_special_tokens=False).ids
    whole = next((first, last) for first, last, text in decode_pieces(ids, tokenizer) if "龘" in text)
    assert whole[1] - whole[0] > 1
    for border in range(len(ids) + 1):
        found = describe_shown(shown(ids, [at >= border for at in range(len(ids))]), 0, tokenizer)["text"]
        text = "".join(segment["text"] for segment in found)
        inside = whole[0] < border < whole[1]
        assert ("\ufffd" in text) is inside, (border, found)
        assert ("龘" in text) is not inside
        assert [(segment["first"], segment["last"]) for segment in found] == [
            part for part in ((0, border), (border, len(ids))) if part[0] < part[1]
        ]


def test_bytes_that_are_no_text_and_ids_without_a_token_are_shown(tokenizer: Tokenizer) -> None:
    part = tokenizer.encode("龘", add_special_tokens=False).ids
    ids = [*part[:-1], 100_000, *part, 4_000_000_000, *part[:-1]]  # cut by an id that is no token, and by the end
    pieces = list(decode_pieces(ids, tokenizer))
    text = "".join(piece for _, _, piece in pieces)
    assert re.fullmatch(r" ?\ufffd+\[no token: 100000\] ?龘\[no token: 4000000000\] ?\ufffd+", text), text
    assert pieces[-1][1] == len(ids)
    invalid = list(decode_pieces(part[:-1][-1:] * 30, tokenizer))  # never a character
    assert invalid[-1][1] == 30
    assert len(invalid) > 2


def test_loss_is_marked_by_signs_or_by_colour(tokenizer_dir: Path) -> None:
    tokenizer = load_backend(tokenizer_dir)
    ids = tokenizer.encode("hi\nyou ⟦⏎\n", add_special_tokens=False).ids
    at = [text for _, _, text in decode_pieces(ids, tokenizer)].index("\n")
    mask = [position >= at for position in range(len(ids))]
    plain = format_shown(shown(ids, mask, untruncated=1234), 3, tokenizer, colour=False)
    header, body = plain.split("\n\n", 1)
    assert header.splitlines() == [
        "conversation 3 of train, rows.jsonl:17",
        f"tokens      {len(ids)}, cut from 1,234; {sum(mask)} with loss",
        f"loss runs   1: {at} .. {len(ids) - 1}",
    ]
    assert body == "hi⟦\nyou \\u27e6⏎\n⟧"
    coloured = format_shown(shown(ids, mask), 3, tokenizer, colour=True).split("\n\n", 1)[1]
    assert coloured == "hi\x1b[1;32m⏎\x1b[0m\n\x1b[1;32myou ⟦\\u23ce⏎\x1b[0m\n"
    assert "⟦" not in format_shown(shown(ids, [False] * len(ids)), 0, tokenizer, colour=False).replace("\\u27e6", "")


def test_many_runs_are_not_all_named(tokenizer_dir: Path) -> None:
    text = format_shown(shown([70] * 200, [0, 1] * 100), 0, load_backend(tokenizer_dir), colour=False)
    assert "loss runs   100: 1 .. 1, 3 .. 3, " in text
    assert "63 .. 63, ...\n" in text


def test_text_cannot_drive_the_terminal(tokenizer_dir: Path) -> None:
    hostile = "\x1b[2J\x07\r\x00\x9b31m\u202eabc\u2028 \t\n\x7f 👩‍👧 é"
    assert visible(hostile) == "\\x1b[2J\\x07\\r\\x00\\x9b31m\\u202eabc\\u2028 \t\n\\x7f 👩‍👧 é"
    assert quoted(hostile, 100) == "'\\x1b[2J\\x07\\r\\x00\\x9b31m\\u202eabc\\u2028 \\t\\n\\x7f 👩\\u200d👧 é'"
    assert quoted("x" * 20) == f"'{'x' * 13}…'"
    tokenizer = load_backend(tokenizer_dir)
    ids = tokenizer.encode(hostile, add_special_tokens=False).ids
    for loss in (False, True):
        conversation = shown(ids, [loss] * len(ids))._replace(file="a\x1b[31m\n.jsonl")
        text = format_shown(conversation, 0, tokenizer, colour=False)
        assert not set("\x1b\x07\r\x00\x9b\u202e\x7f") & set(text)
        assert text.startswith("conversation 0 of train, a\\x1b[31m\\n.jsonl:17\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert shows_colour(Terminal())
    assert not shows_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")  # by the convention, an empty value asks for nothing
    assert shows_colour(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not shows_colour(Terminal())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not shows_colour(Terminal())


def test_samples_are_numbered_by_split(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    backend = load_backend(tokenizer_dir)
    ids = np.array(backend.encode("hi there", add_special_tokens=False).ids, np.uint32)
    mask = np.arange(len(ids)) > 0
    samples = [(split, "f.jsonl", line, ids, mask, len(ids)) for split, line in (("a", 4), ("a", 9), ("b", 1))]
    for stream, sign in ((io.StringIO(), "⟦"), (Terminal(), "\x1b[1;32m")):
        show_samples(samples, backend.to_str(), stream)
        text = stream.getvalue()
        assert re.findall(r"conversation .*", text) == [
            "conversation 0 of a, f.jsonl:4", "conversation 1 of a, f.jsonl:9", "conversation 0 of b, f.jsonl:1",
        ]  # fmt: skip
        assert text.count(sign) == 3


def test_a_table_of_tokens(tokenizer_dir: Path) -> None:
    backend = load_backend(tokenizer_dir)
    ids = backend.encode("hi 龘\n", add_special_tokens=False).ids
    table = token_table(shown(ids, [at % 2 for at in range(len(ids))]), 1, len(ids), backend)
    assert [row["position"] for row in table] == list(range(1, len(ids)))
    assert [row["token_id"] for row in table] == ids[1:]
    assert [row["loss"] for row in table] == [bool(at % 2) for at in range(1, len(ids))]
    assert table[-1]["text"] == "\n"
    assert "\ufffd" in [row["text"] for row in table]
    assert all(row["text"] is None for row in token_table(shown(ids, [1] * len(ids)), 0, 2, None))


# --- the command ---


def chat(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


@pytest.fixture
def prepared(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """Two splits, of which the held-out one has a row of the other, and a row that is set aside."""
    rows = [chat("hi", "the answer"), chat("what?", "this\nthat"), {"nothing": "\x1b[31m"}, chat("hi", "the answer")]
    for name, lines in (("train", rows), ("dev", [chat("dev", "dev"), rows[0]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["prepare", *job(tmp_path, tokenizer_dir)]) == 1
    return tmp_path / "out"


def job(tmp_path: Path, tokenizer: Path) -> list[str]:
    dev = f"dev={tmp_path / 'dev.jsonl'}"
    output = str(tmp_path / "out")
    return ["--tokenizer", str(tokenizer), "--output", output, f"train={tmp_path / 'train.jsonl'}", "--held-out", dev]


def test_the_tables_are_those_of_prepare(prepared: Path, tokenizer_dir: Path, capfd: Any) -> None:
    capfd.readouterr()
    assert main(["inspect", str(prepared)]) == 0
    text, err = capfd.readouterr()
    assert main(["prepare", *job(prepared.parent, tokenizer_dir)]) == 1
    again, warned = capfd.readouterr()
    assert again == text.removeprefix(f"dataset {prepared}\n") + f"\n{prepared}: was already made by this job\n"
    for part in (
        f"train: 1 x unknown-form (25.00% of 4 rows), first {prepared.parent}/train.jsonl:3: found 'keys [",
        "dev: 1 rows that train has too",
        "train, conversations: min ",
        "train, answers: min ",
        "dev, answers: min ",
        "#####",
        "| Exact duplicates (kept) ",
    ):
        assert part in text, part
    for said in (err, warned):
        assert "warning: 1 rows of dev (held out) are also in train" in said
        assert "--drop-duplicates" in said
    assert main(["inspect", str(prepared), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["dataset"] == TokenDataset.open(prepared).manifest


def test_only_what_a_held_out_split_has_of_one_that_is_not_is_leakage() -> None:
    names = ("a", "b", "dev", "test")
    manifest = {
        "splits": {name: {"held_out": name in ("dev", "test")} for name in names},
        "shared_rows": [
            {"splits": [first, second], "rows": 3}
            for number, first in enumerate(names)
            for second in names[number + 1 :]
        ],
    }
    found = [re.findall(r"rows of (\w+) .* also in (\w+)", line) for line in leakage_warnings(manifest)]
    assert found == [[("dev", "a")], [("test", "a")], [("dev", "b")], [("test", "b")]]
    assert leakage_warnings({"splits": manifest["splits"]}) == []


def test_dropped_duplicates_are_told(prepared: Path, tokenizer_dir: Path, capfd: Any) -> None:
    capfd.readouterr()
    assert main(["prepare", *job(prepared.parent, tokenizer_dir), "--drop-duplicates", "--overwrite"]) == 1
    text, err = capfd.readouterr()
    assert "train: 1 duplicates dropped of rows of train" in text
    assert "dev: 1 duplicates dropped of rows of train" in text
    assert "held out) are also" not in err
    assert [len(TokenDataset.open(prepared).split(name)) for name in ("train", "dev")] == [2, 1]


def test_one_conversation_by_split_and_number(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(prepared), "--conversation", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"conversation 1 of train, {prepared.parent}/train.jsonl:2\ntokens ")
    body = "<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n⟦this\nthat<|im_end|>⟧\n"
    assert text.endswith(f"\n\n{body}\n")
    assert main(["inspect", str(prepared), "--conversation", "0", "--split", "dev", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    ids, mask, _ = TokenDataset.open(prepared).split("dev")[0]
    assert (found["split"], found["line"], found["tokens"], found["table"]) == ("dev", 1, len(ids), None)
    assert [segment["text"] for segment in found["text"] if segment["loss"]] == ["dev<|im_end|>"]
    ((first, last),) = found["loss_runs"]
    assert np.flatnonzero(mask).tolist() == list(range(first, last))
    assert main(["inspect", str(prepared), "--conversation", "1", "--rows", "1,4"]) == 0
    lines = capsys.readouterr().out.splitlines()[4:]
    assert len(lines) == 1 + 3
    assert lines[0].split() == ["token", "id", "text", "loss"]
    assert main(["inspect", str(prepared), "--conversation", "1", "--rows", "1,4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["position"] for row in found["table"]] == [1, 2, 3]
    assert found["text"] is None


def test_refusals(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text(sentencepiece_like().to_str())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    one = ("--conversation", "0")
    for flags, said in (
        ((*one, "--index", "1"), "--index: expected a store, found the prepared dataset"),
        (("--split", "dev", "--index", "1"), "--index: expected a store, found the prepared dataset"),
        (("--allow-partial",), "--allow-partial: expected a store, found the prepared dataset"),
        (("--split", "dev"), "--split: expected --conversation N"),
        (("--rows", "1,2"), "--rows: expected --conversation N"),
        (("--tokenizer", "x"), "--tokenizer: expected --conversation N"),
        (("--conversation", "3"), "expected a conversation of train in 0 .. 2, found 3"),
        (("--conversation", "-1"), "0 .. 2, found -1"),
        ((*one, "--split", "val"), "expected a split among ['train', 'dev'], found 'val'"),
        ((*one, "--rows", "3"), "--rows: expected A,B"),
        ((*one, "--rows", "3,3"), "--rows: expected A,B with 0 <= A < B <= "),
        ((*one, "--rows", "0,999"), "train.jsonl:1, found 0,999"),
        ((*one, "--tokenizer", str(tmp_path / "empty")), "expected a directory with a tokenizer.json"),
        ((*one, "--tokenizer", str(tmp_path / "bad")), "expected a tokenizer that `tokenizers` loads"),
        ((*one, "--tokenizer", str(tmp_path / "other")), "expected the tokenizer of the dataset"),
    ):
        capsys.readouterr()
        assert main(["inspect", str(prepared), *flags]) == 2, flags
        out, err = capsys.readouterr()
        assert said in err, (flags, err)
        assert out == ""
    assert main(["prepare", *job(prepared.parent, tmp_path), "--show", "-1"]) == 2
    assert "--show: expected a number of rows of at least 0, found -1" in capsys.readouterr().err


def test_inspection_needs_no_torch(prepared: Path) -> None:
    code = (
        "import sys; from draftcache.tools.cli import main; "
        f"main(['inspect', {str(prepared)!r}]); main(['inspect', {str(prepared)!r}, '--conversation', '0']); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


# --- datasets of an earlier draftcache ---


def make_old(path: Path) -> None:
    """Take away what earlier datasets lack: the tokenizer and the newer figures."""
    (path / "tokenizer.json").unlink()
    manifest = unseal((path / "manifest.json").read_bytes(), "")
    for key in ("coverage_curve", "shared_rows", "drop_duplicates"):
        del manifest[key]
    del manifest["files"]["tokenizer.json"]
    for record in manifest["splits"].values():
        for key in ("read_rows", "dropped_duplicates", "lengths", "answer_lengths", "quarantine"):
            del record[key]
    (path / "manifest.json").write_bytes(seal(manifest))


def test_an_older_dataset_is_shown_and_asks_for_its_tokenizer(
    prepared: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_old(prepared)
    capsys.readouterr()
    assert main(["inspect", str(prepared)]) == 0
    text = capsys.readouterr().out
    assert "train: 1 x unknown-form\n" in text
    assert "| Rows / conversations " in text
    assert main(["prepare", *job(prepared.parent, tokenizer_dir)]) == 1
    assert "was already made by this job" in capsys.readouterr().out
    assert main(["inspect", str(prepared), "--conversation", "0"]) == 2
    assert "Give --tokenizer DIR, or --rows A,B" in capsys.readouterr().err
    assert main(["inspect", str(prepared), "--conversation", "0", "--tokenizer", str(tokenizer_dir)]) == 0
    assert "⟦the answer<|im_end|>⟧" in capsys.readouterr().out
    assert main(["inspect", str(prepared), "--conversation", "0", "--rows", "0,2"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[5:]] == ["-", "-"]
    assert main(["vocab", str(prepared), "--size", "20", "--output", str(prepared.parent / "map.safetensors")]) == 0


def test_a_recorded_dataset_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    assert main(["inspect", str(tmp_path / "prepared")]) == 0
    text = capsys.readouterr().out
    assert "draft vocabulary eafa8db25b3930c82b3203739006009f" in text
    assert "answers" not in text
    assert main(["inspect", str(tmp_path / "prepared"), "--conversation", "3", "--rows", "0,5"]) == 0
    assert capsys.readouterr().out.startswith("conversation 3 of train, rows.jsonl:4\n")


def test_flags_that_a_store_lets_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "s")
    for flags, said in (
        (("--conversation", "0", "--split", "train"), "--split goes with --conversation for prepared datasets"),
        (("--conversation", "0", "--split", "train", "--index", "0"), "found all of them"),
    ):
        assert main(["inspect", str(tmp_path / "s"), *flags]) == 2
        assert said in capsys.readouterr().err
