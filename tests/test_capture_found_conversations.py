"""Conversations as they are found, through the whole of prepare, by a template that knows tools and reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.chat.tokenizer_files import SHIPPED_TEMPLATE
from draftcache.capture.prepare.job import PrepareConfig, prepare
from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.store.common.errors import InputError
from draftcache.tools.cli import main
from support.chat_tokenizers import save_tokenizer

QUESTION = {"role": "user", "content": "Is 91 prime?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = SHIPPED_TEMPLATE.read_text(encoding="utf-8")
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "nemotron", template)


def prepared(
    tokenizer: Path, directory: Path, *rows: Any, **settings: Any
) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """(the whole text, the text under loss) of each row, and the manifest."""
    from tokenizers import Tokenizer

    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = ChatSettings(**settings)
    config = PrepareConfig(
        tokenizer=tokenizer,
        output=directory / "out",
        splits={"train": [directory / "rows.jsonl"]},
        held_out={},
        chat=chat,
        workers=1,
        progress=False,
    )
    manifest = prepare(config).manifest
    split = TokenDataset.open(directory / "out").split("train")
    backend = Tokenizer.from_file(str(directory / "out" / "tokenizer.json"))

    def text(ids: Any) -> str:
        return str(backend.decode(ids.tolist(), skip_special_tokens=False))

    return [(text(ids), text(ids[mask])) for ids, mask, _ in (split[number] for number in range(len(split)))], manifest


def test_parts_are_the_plain_text(tokenizer: Path, tmp_path: Path) -> None:
    plain = [QUESTION, {"role": "assistant", "content": "No."}]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in plain]
    (first, second), _ = prepared(tokenizer, tmp_path, {"messages": plain}, {"messages": parts})
    assert first == second


def test_arguments_as_text_null_contents_and_tools(tokenizer: Path, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": None, "reasoning": "ask", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "content": "It rains.", "reasoning": "told"},
    ]
    ((text, learned),), manifest = prepared(tokenizer, tmp_path, {"messages": messages, "tools": TOOLS})
    assert "<parameter=city>\nOslo\n</parameter>" in learned
    assert learned.endswith("told\n</think>\nIt rains.<|im_end|>")
    assert "rain\n</tool_response>" in text
    assert manifest["chat_template"]["traits"]["arguments"] == "object"
    assert manifest["notes"] == []


@pytest.mark.parametrize(
    ("turns", "learned"),
    [
        ("auto", ["91 = 7 * 13\n</think>\nNo.<|im_end|>", "small\n</think>\nYes.<|im_end|>"]),
        ("each", ["91 = 7 * 13\n</think>\nNo.<|im_end|>", "small\n</think>\nYes.<|im_end|>"]),
        ("last", ["small\n</think>\nYes.<|im_end|>"]),
        ("all", ["</think>No.<|im_end|>small\n</think>\nYes.<|im_end|>"]),
    ],
)
def test_thinking_that_history_loses(tokenizer: Path, tmp_path: Path, turns: str, learned: list[str]) -> None:
    messages = [
        QUESTION,
        {"role": "assistant", "reasoning_content": "91 = 7 * 13", "content": "No."},
        {"role": "user", "content": "And 97?"},
        {"role": "assistant", "reasoning_content": "small", "content": "Yes."},
    ]
    found, manifest = prepared(tokenizer, tmp_path, {"messages": messages}, turns=turns)
    assert [under_loss for _, under_loss in found] == learned
    assert manifest["chat_template"]["traits"]["rewrites_history"]
    assert manifest["chat_template"]["settings"]["turns"] == turns


def test_a_developer_a_system_beside_the_messages_and_a_weight(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "developer", "content": "One word."}, QUESTION, {"role": "assistant", "content": "No"}]},
        {"system": "Be brief.", "messages": [QUESTION, {"role": "assistant", "content": "No."}]},
        {
            "messages": [
                {"role": "user", "content": "Say a."},
                {"role": "assistant", "content": "aaa", "weight": 0},
                {"role": "user", "content": "Say b."},
                {"role": "assistant", "content": "bbb"},
            ]
        },
    ]
    found, _ = prepared(tokenizer, tmp_path, *rows, template_args={"enable_thinking": False})
    assert found[0][0].startswith("<|im_start|>system\nOne word.<|im_end|>")
    assert found[1][0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert found[2][1] == "bbb<|im_end|>"
    assert "aaa" in found[2][0]


def test_text_that_no_template_renders_is_counted_with_an_example(tokenizer: Path, tmp_path: Path) -> None:
    row = {"messages": [{**QUESTION, "mood": "curious"}, {"role": "assistant", "content": "No.", "thoughts": "seven"}]}
    _, manifest = prepared(tokenizer, tmp_path, row, row, template_args={"enable_thinking": False})
    notes = {note["kind"]: note for note in manifest["notes"]}
    assert notes["text not learned or not rendered: user's mood"]["count"] == 2
    assert notes["text not learned or not rendered: assistant's thoughts"]["example"].endswith("rows.jsonl:1: seven")


@pytest.mark.parametrize(
    "flags",
    [
        ["--turns", "last"],
        ["--template-arg", "enable_thinking=false"],
        ["--system", "Be kind."],
        ["--date", "2025-01-01"],
        ["--loss-mask", "tags"],
        ["--strict"],
        ["--max-length", "100"],
        ["--role", "narrator=system"],
        ["--drop-duplicates"],
    ],
    ids=lambda flags: flags[0],
)
def test_another_setting_is_another_job(
    tokenizer: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [QUESTION, {"role": "assistant", "content": "No."}]}))
    words = ["prepare", f"train={tmp_path / 'rows.jsonl'}", "--tokenizer", str(tokenizer), "--workers", "1"]
    words += ["--output", str(tmp_path / "out")]
    assert main(words) == 0
    assert main(words) == 0
    assert "was already made by this job" in capsys.readouterr().out
    assert main([*words, *flags]) == 2
    assert "made from other inputs or settings" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [QUESTION, {"role": "assistant", "content": "Yes"}]}))
    assert main(words) == 2


def test_the_stop_tokens_are_part_of_the_job(tokenizer: Path, tmp_path: Path) -> None:
    row = {"messages": [QUESTION, {"role": "assistant", "content": "No.", "reasoning": "x"}]}
    (_, learned), *_ = prepared(tokenizer, tmp_path, row)[0]
    assert learned.endswith("<|im_end|>")
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": [2]}')
    try:
        with pytest.raises(InputError, match="made from other inputs or settings"):
            prepared(tokenizer, tmp_path, row)
        (tokenizer / "generation_config.json").write_text('{"eos_token_id": "two"}')
        with pytest.raises(InputError, match="eos_token_id to be token ids"):
            prepared(tokenizer, tmp_path, row)
    finally:
        (tokenizer / "generation_config.json").unlink()
