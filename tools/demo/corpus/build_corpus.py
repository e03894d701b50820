"""Build the demo's conversations: `python -m draftcache.tools.demo.corpus.build_corpus --sources DIR --corpus DIR`.

Every conversation of every source goes to `--corpus`, a scratch directory with the text that the verifier trains on.
A fair sample, the prompts and the licence texts go to `--assets`, which is shipped. A hash of the source item (module
or page, play, block of words) decides the split, and held-out conversations that share more than 10 % of their 8-word
shingles with the train split are left out. Run it with Python 3.11, because it reads that interpreter's library.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from draftcache.store.common.files import write_json
from draftcache.tools.demo.corpus.conversation import Conversation, drop_near_duplicates, split_of
from draftcache.tools.demo.corpus.licences import write_licences
from draftcache.tools.demo.corpus.play_conversations import play_conversations
from draftcache.tools.demo.corpus.python_conversations import docs_conversations, library_conversations
from draftcache.tools.demo.corpus.sources import Sources, fetch_sources
from draftcache.tools.demo.corpus.wordnet_conversations import wordnet_conversations

__all__ = ["main"]

ASSETS = Path(__file__).parents[1] / "assets"
SEED = 20250
VAL_SHARES = {"python": 0.04, "play": 0.06, "words": 0.01}
SHIPPED_TRAIN_CHARACTERS = 7_500_000
SHIPPED_VAL = 480
MAX_CHARACTERS = 3400
"""Characters of the longest conversation that is kept: about 1,000 tokens."""
SHIPPED_MIX = {
    "docs-api": 0.2,
    "docs-faq": 0.02,
    "docs-text": 0.25,
    "docstrings": 0.1,
    "code": 0.15,
    "words": 0.12,
    "plays": 0.16,
}
"""Share of each source in the shipped sample, by characters."""


def build_splits(sources: Sources) -> dict[str, list[Conversation]]:
    """Return all conversations of all sources by split, each split shuffled by a fixed seed."""
    splits: dict[str, list[Conversation]] = {"train": [], "val": []}
    seen: set[str] = set()
    for makers in (
        docs_conversations(sources.docs),
        library_conversations(),
        play_conversations(sources.plays),
        wordnet_conversations(sources.wordnet),
    ):
        for conversation in makers:
            if conversation.id in seen or not _usable(conversation):
                continue
            seen.add(conversation.id)
            share = VAL_SHARES[conversation.item.split("/")[0]]
            splits[split_of(conversation.item, share)].append(conversation)
    splits["val"] = drop_near_duplicates(splits["val"], splits["train"])
    for rows in splits.values():
        rows.sort(key=lambda row: row.id)
        random.Random(SEED).shuffle(rows)
    return splits


def _usable(conversation: Conversation) -> bool:
    return all(conversation.turns) and len(conversation.turns) >= 2 and conversation.characters <= MAX_CHARACTERS


def sample(rows: list[Conversation], budget: float, *, by_count: bool) -> list[Conversation]:
    """Return the first rows of each source, up to its share of `budget` (conversations or characters).

    They are shuffled again: otherwise all rows of a source with a small share would be at the front.
    """
    left = {source: share * budget for source, share in SHIPPED_MIX.items()}
    kept: list[Conversation] = []
    for row in rows:
        if left[row.source] > 0:
            left[row.source] -= 1 if by_count else row.characters
            kept.append(row)
    random.Random(SEED).shuffle(kept)
    return kept


def write_rows(path: Path, rows: Iterable[dict[str, object]]) -> int:
    """Write gzipped JSON lines without a time stamp, so that equal rows give equal bytes. Returns the size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    return path.stat().st_size


def write_prompts(sources: Sources, directory: Path) -> None:
    """Write MT-Bench (80 two-turn questions) and HumanEval (164 functions) as conversations with user turns only."""
    questions = [json.loads(line) for line in sources.mt_bench.read_text(encoding="utf-8").splitlines()]
    write_rows(
        directory / "mt_bench.jsonl.gz",
        (
            {
                "id": f"mt-bench-{question['question_id']}",
                "source": "mt-bench",
                "category": question["category"],
                "messages": [{"role": "user", "content": question["turns"][0]}],
                "next_user_turns": question["turns"][1:],
            }
            for question in questions
        ),
    )
    with gzip.open(sources.human_eval, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    write_rows(
        directory / "humaneval.jsonl.gz",
        (
            {
                "id": problem["task_id"].lower().replace("/", "-"),
                "source": "humaneval",
                "messages": [
                    {
                        "role": "user",
                        "content": f"Complete this Python function:\n\n```python\n{problem['prompt'].strip()}\n```",
                    }
                ],
            }
            for problem in problems
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch the sources, convert and split them, write all files and print the summary as JSON."""
    parser = argparse.ArgumentParser(description="Build the demo's corpus and shipped conversations.")
    parser.add_argument("--sources", type=Path, required=True, help="where downloads are kept")
    parser.add_argument("--corpus", type=Path, required=True, help="where the whole corpus is written (scratch)")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the shipped sample is written")
    arguments = parser.parse_args(argv)
    sources = fetch_sources(arguments.sources)
    splits = build_splits(sources)
    shipped = {
        "train": sample(splits["train"], SHIPPED_TRAIN_CHARACTERS, by_count=False),
        "val": sample(splits["val"], SHIPPED_VAL, by_count=True),
    }
    summary: dict[str, object] = {"python": platform.python_version(), "seed": SEED}
    for name, rows in splits.items():
        write_rows(arguments.corpus / f"{name}.jsonl.gz", (row.row() for row in rows))
        size = write_rows(arguments.assets / "conversations" / f"{name}.jsonl.gz", (row.row() for row in shipped[name]))
        characters = Counter[str]()
        for row in rows:
            characters[row.source] += row.characters
        summary[name] = {
            "conversations": dict(sorted(Counter(row.source for row in rows).items())),
            "characters": dict(sorted(characters.items())),
            "shipped": dict(sorted(Counter(row.source for row in shipped[name]).items())),
            "shipped_bytes": size,
        }
    write_prompts(sources, arguments.assets / "prompts")
    write_licences(sources, arguments.assets / "LICENSES")
    write_json(arguments.corpus / "summary.json", summary)
    print(json.dumps(summary, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
