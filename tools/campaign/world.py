"""The small world of a campaign: conversations, a verifier, and what each command makes of them undisturbed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.files import hash_file
from draftcache.store.format.commits import committed_shards, read_record, shard_name
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location, open_storage
from draftcache.tools.campaign.processes import import_everything, run
from draftcache.tools.demo.pipeline import ASSETS, VERIFIER, read_conversations

LAYOUTS = ("zarr", "webdataset")


class World:
    """Inputs in a directory, and the commands over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        import_everything()
        root.mkdir(parents=True)
        for name, first, rows in (("train", 0, 8), ("val", 8, 2), ("other", 20, 8)):
            found = read_conversations(ASSETS / "conversations" / "train.jsonl.gz", first, rows)
            (root / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in found), encoding="utf-8")
        self.make(self.prepare(root / "prepared"))
        for layout in LAYOUTS:
            self.make(self.capture(root / layout, layout=layout))
        self.make(self.prepare(root / "other-prepared", rows="other"))
        self.make(self.capture(root / "other-zarr", dataset="other-prepared"))
        self.make(self.capture(root / "other-webdataset", dataset="other-prepared", layout="webdataset"))
        self.make(self.train(root / "run"))
        self.make([*self.train(root / "other-run"), "--seed", 1])
        self.make(self.export(root / "draft"))
        self.make(self.evaluate(root / "eval.json"))
        self.make(self.vocab(root / "map.safetensors"))
        self.make(self.probe(root / "probe.safetensors"))
        for layout in LAYOUTS:
            self.make(self.convert(root / f"converted-{layout}", layout))

    def make(self, words: Sequence[object]) -> None:
        """Run a command that has to succeed. Raises DraftcacheError where it does not."""
        if (ended := run(words)).code != 0:
            raise DraftcacheError(f"{ended}\n{ended.errors}")

    def prepare(self, output: Path, rows: str = "train") -> list[object]:
        """The command that prepares the conversations."""
        return [
            "prepare", f"train={self.root / rows}.jsonl", "--held-out", f"val={self.root / 'val.jsonl'}",
            "--tokenizer", VERIFIER, "--output", output, "--max-length", 256, "--draft-vocab-size", 512, "--workers", 1,
        ]  # fmt: skip

    def capture(self, output: Location, dataset: str = "prepared", layout: str = "zarr") -> list[object]:
        """The command that captures them, into a few shards."""
        return [
            "capture", "--verifier", VERIFIER, "--dataset", self.root / dataset, "--output", output,
            "--splits", "train,val", "--layers", "2,5,10", "--top-k", 8, "--window", 64, "--shard-tokens", 400,
            "--device", "cpu", "--layout", layout,
        ]  # fmt: skip

    def train(self, output: Path) -> list[object]:
        """The command that trains a draft, with a checkpoint after every second step."""
        return [
            "train", "--store", self.root / "zarr", "--output", output, "--splits", "train", "--epochs", 3,
            "--batch-conversations", 2, "--sliding-window", 64, "--intermediate-size", 32, "--head-dim", 8,
            "--num-attention-heads", 4, "--num-key-value-heads", 2, "--ttt-steps", 2, "--checkpoint-every", 2,
            "--keep-checkpoints", 2, "--device", "cpu",
        ]  # fmt: skip

    def export(self, output: Path, checkpoint: Path | None = None) -> list[object]:
        """The command that exports the draft."""
        return ["export", "--checkpoint", checkpoint or self.root / "run", "--engine", "vllm", "--output", output]

    def evaluate(self, output: Path) -> list[object]:
        """The command that evaluates the draft."""
        return [
            "eval", "--store", self.root / "zarr", "--checkpoint", self.root / "run", "--splits", "val",
            "--device", "cpu", "--output", output,
        ]  # fmt: skip

    def vocab(self, output: Path) -> list[object]:
        """The command that makes a vocabulary map."""
        return ["vocab", "--size", 256, "--output", output, self.root / "prepared"]

    def probe(self, output: Path) -> list[object]:
        """The command that dumps the verifier's states."""
        return [
            "probe", "--verifier", VERIFIER, "--output", output, "--layers", "2,5,10", "--token-ids", "5,6,7,8",
            "--device", "cpu",
        ]  # fmt: skip

    def convert(self, output: Location, layout: str, source: Path | None = None) -> list[object]:
        """The command that copies the store into another layout."""
        return [
            "convert",
            source or self.root / ("zarr" if layout != "zarr" else "webdataset"),
            output,
            "--layout",
            layout,
        ]


def store_content(location: Location) -> dict[str, Any]:
    """Return the hashes of everything that a store's records name, by shard and name of the file in it."""
    storage = open_storage(location)
    content: dict[str, Any] = {}
    for stem in [*map(shard_name, committed_shards(storage)), "frozen", "vocab_map", "index"]:
        record = read_record(storage, stem)
        files = {} if record is None else record["files"]
        # An attempt whose name was taken has a suffix: 00003-1c0ffee5/tap_2_hi/c.0
        content[stem] = {re.sub(r"^(shards/\d+)[^/]*", r"\1", name): item["xxh3_128"] for name, item in files.items()}
    return content


def committed(location: Location) -> dict[str, Any]:
    """Return the part of `store_content` that is in the shards committed so far."""
    return {stem: files for stem, files in store_content(location).items() if stem.isdigit()}


def store_reading(location: Location) -> str:
    """Return a hash of every value that a reader finds in a store. Raises the reader's errors."""
    digest = hashlib.sha256()
    reader = StoreReader(location)
    for number in range(len(reader)):
        item = reader.read(number)
        for name in sorted(item.arrays):
            digest.update(name.encode() + item.arrays[name].tobytes())
    vocabularies = [vocabulary.size for vocabulary in reader.manifest.teacher_form.vocabularies]
    digest.update(str([reader.vocab_map(size).hash for size in vocabularies]).encode())
    digest.update(hash_file(reader.files.frozen).encode())
    reader.close()
    return digest.hexdigest()


def tree_content(path: Path) -> dict[str, str]:
    """Return the hashes of all files below a directory, hidden ones left out, by their paths in it."""
    if path.is_file():
        return {"": hash_file(path)}
    files = sorted(item for item in path.rglob("*") if item.is_file() and not item.name.startswith("."))
    return {item.relative_to(path).as_posix(): hash_file(item) for item in files}


def run_content(path: Path) -> dict[str, Any]:
    """Return what a training run came to: its newest checkpoint's tensors, and the losses of all steps."""
    checkpoints = sorted((path / "checkpoints").glob("step_*"))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tensors = {item.name: hash_file(item) for item in checkpoints[-1].glob("*.safetensors")}
    return {"checkpoint": checkpoints[-1].name, "losses": [(row["step"], row["loss"]) for row in rows], **tensors}
