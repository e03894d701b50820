"""The prepared dataset on disk (token ids, loss masks, origin of each conversation): layout and reader.

    manifest.json                sealed with its own hash; written last: a directory without it is not a dataset
    vocab_map.safetensors        if a draft vocabulary was asked for (store/format/vocab_map.py)
    tokenizer.json               the tokenizer that made the ids, as `tokenizers` serialises it; older datasets lack it
    SPLIT/token_ids.npy          uint32 [tokens], conversations packed flat
    SPLIT/loss_mask.npy          bool [tokens], True where the assistant wrote the token
    SPLIT/conversations.npy      CONVERSATION_DTYPE [rows]
    SPLIT/token_counts.npy       int64 [vocab], loss-masked tokens per id
    SPLIT/quarantine.jsonl       one record per unusable row: file, line, reason, expected, found

Arrays are plain .npy files, opened memory-mapped and without pickle. token_dataset_writer.py writes them. Nothing is
used unchecked: opening a dataset compares the hash of every file but token_ids.npy and loss_mask.npy, and these are
compared conversation by conversation, as they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from draftcache.store.common.errors import InputError, StoreError
from draftcache.store.common.files import hash_bytes, hash_file, hash_json, read_json
from draftcache.store.common.sealed_json import SEAL, unseal

FORMAT = "draftcache-prepared"
VERSION = 2
_UNSEALED_VERSION = 1  # of datasets whose manifest.json has no hash of its own
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
TOKENIZER = "tokenizer.json"

CONVERSATION_DTYPE = np.dtype(
    [
        ("content_hash", "V16"),  # xxh3-128 digest of the uint32 ids' bytes, then the mask's bytes
        ("first_token", "<i8"),
        ("tokens", "<i8"),  # as stored, after truncation
        ("untruncated_tokens", "<i8"),
        ("loss_tokens", "<i8"),
        ("source_line", "<i8"),  # from 1
        ("source_file", "<i4"),  # index into the manifest's `sources` of the split
    ]
)

_ARRAYS = {
    "token_ids": np.dtype("<u4"),
    "loss_mask": np.dtype("?"),
    "conversations": CONVERSATION_DTYPE,
    "token_counts": np.dtype("<i8"),
}


def conversation_hash(token_ids: np.ndarray, loss_mask: np.ndarray) -> bytes:
    """The 16-byte digest of one conversation: `token_ids` uint32 [T], `loss_mask` bool [T]."""
    ids, mask = np.ascontiguousarray(token_ids, "<u4"), np.ascontiguousarray(loss_mask, np.bool_)
    return bytes.fromhex(hash_bytes(ids.tobytes(), mask.tobytes()))


class PreparedRow(NamedTuple):
    """A conversation and where it comes from: ids uint32 [T], loss mask bool [T], its length before truncation."""

    split: str
    file: str
    line: int  # from 1
    token_ids: np.ndarray
    loss_mask: np.ndarray
    untruncated_tokens: int


@dataclass(frozen=True)
class DatasetDamage:
    """A file that is not what the manifest says, and the conversations of its split whose content hash differs."""

    name: str
    problem: str
    conversations: tuple[int, ...] = ()


class TokenSplit:
    """One split, memory-mapped: `split[i]` -> (token_ids uint32 [T], loss_mask bool [T], content hash in hex).

    Reading a conversation raises InputError where its ids and mask don't have its content hash.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.token_ids = self._array("token_ids")
        self.loss_mask = self._array("loss_mask")
        self.conversations = self._array("conversations")
        self.token_counts = self._array("token_counts")
        tokens = int(self.conversations["tokens"].sum())
        for name, array, expected in (
            ("token_ids", self.token_ids, tokens),
            ("loss_mask", self.loss_mask, tokens),
            ("token_counts", self.token_counts, vocab_size),
        ):
            if len(array) != expected:
                raise InputError(f"{path / name}.npy: expected {expected} values, found {len(array)}")

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        token_ids, loss_mask, expected = self._stored(index)
        if (found := conversation_hash(token_ids, loss_mask).hex()) != expected:
            raise InputError(
                f"{self.path}: expected conversation {index} to have the content hash {expected}, found {found}: "
                "token_ids.npy or loss_mask.npy is damaged; `draftcache verify` names all that is, prepare it again"
            )
        return token_ids, loss_mask, expected

    def damaged(self) -> tuple[int, ...]:
        """Return the numbers of the conversations whose ids and mask don't have their content hash."""
        stored = ((index, *self._stored(index)) for index in range(len(self)))
        return tuple(index for index, ids, mask, expected in stored if conversation_hash(ids, mask).hex() != expected)

    def _stored(self, index: int) -> tuple[np.ndarray, np.ndarray, str]:
        record = self.conversations[index]
        first, last = int(record["first_token"]), int(record["first_token"] + record["tokens"])
        return self.token_ids[first:last], self.loss_mask[first:last], bytes(record["content_hash"]).hex()

    def _array(self, name: str) -> np.ndarray:
        path = self.path / f"{name}.npy"
        try:
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as exc:
            raise InputError(f"{path}: expected a .npy array, found something else ({exc})") from exc
        if array.ndim != 1 or array.dtype != _ARRAYS[name]:
            raise InputError(f"{path}: expected {_ARRAYS[name]} [n], found {array.dtype} {list(array.shape)}")
        return array


class TokenDataset:
    """A finished prepared dataset. Use `open`; a split is mapped when it is first asked for."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._open_splits: dict[str, TokenSplit] = {}

    @classmethod
    def open(cls, path: Path) -> TokenDataset:
        """Open a dataset. Raises InputError, with the path, where it is missing, of another version or cut short."""
        dataset = cls(path, _read_manifest(path))
        for name in dataset.manifest["files"]:
            read_later = name.endswith(("/token_ids.npy", "/loss_mask.npy"))
            problem = dataset._size_problem(name) or (None if read_later else dataset._hash_problem(name))
            if problem is not None:
                raise InputError(f"{path / name}: {problem}; it was edited or damaged, prepare the dataset again")
        return dataset

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of all splits; held-out ones come last."""
        return tuple(self.manifest["splits"])

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names of the splits that were not counted into the vocabulary map."""
        return tuple(name for name, record in self.manifest["splits"].items() if record["held_out"])

    @property
    def vocab_size(self) -> int:
        """Upper bound of the token ids, exclusive: the verifier's vocabulary."""
        return int(self.manifest["vocab_size"])

    @property
    def tokenizer_hash(self) -> str:
        """Hash of the tokenizer files that decide the ids."""
        return str(self.manifest["tokenizer"]["hash"])

    @property
    def has_tokenizer(self) -> bool:
        """Whether the dataset holds the tokenizer that made its ids, as an older one does not."""
        return TOKENIZER in self.manifest["files"]

    @property
    def chat_template_hash(self) -> str:
        """Hash of the chat template that rendered the conversations."""
        return str(self.manifest["chat_template"]["hash"])

    def split(self, name: str) -> TokenSplit:
        """The split of this name. Raises InputError where there is none or its arrays are wrong."""
        if name not in self.manifest["splits"]:
            raise InputError(f"{self.path}: expected a split among {list(self.splits)}, found {name!r}")
        if name not in self._open_splits:
            self._open_splits[name] = TokenSplit(self.path / name, self.vocab_size)
        return self._open_splits[name]

    def content_hash(self, splits: Iterable[str] | None = None) -> str:
        """Hash of the ids, masks and records of these splits (default: all), from the manifest's hashes."""
        names = [f"{name}/{array}.npy" for name in splits or self.splits for array in _ARRAYS]
        return hash_json([self.manifest["files"][name]["xxh3_128"] for name in names])

    def verify(self) -> None:
        """Read every file and compare its hash. Raises InputError with the path of the first file that differs."""
        for name in self.manifest["files"]:
            if problem := self._hash_problem(name):
                raise InputError(f"{self.path / name}: {problem}")

    def _conversations_touched(self, name: str) -> tuple[int, ...]:
        """Return the conversations that a damage of this file touches, as far as the other files let them be read."""
        split, _, array = name.partition("/")
        if array not in ("token_ids.npy", "loss_mask.npy"):
            return ()
        try:
            return self.split(split).damaged()
        except InputError:  # an array is cut short or no array: the damage itself says so
            return ()

    def _size_problem(self, name: str) -> str | None:
        expected, path = self.manifest["files"][name]["bytes"], self.path / name
        if not path.is_file():
            return f"expected {expected} bytes, found nothing there"
        found = path.stat().st_size
        return None if found == expected else f"expected {expected} bytes, found {found} bytes"

    def _hash_problem(self, name: str) -> str | None:
        expected, found = self.manifest["files"][name]["xxh3_128"], hash_file(self.path / name)
        return None if found == expected else f"expected xxh3-128 {expected}, found {found}"


def is_prepared(path: Path) -> bool:
    """Return whether `path` is a directory whose manifest.json is that of a prepared dataset, of any version."""
    if not (path / MANIFEST).is_file():
        return False
    manifest = read_json(path / MANIFEST)
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def find_damages(
    path: Path,
    progress: Callable[[int], object] = lambda size: None,
    planned: Callable[[int], object] = lambda size: None,
) -> list[DatasetDamage]:
    """Read every file of a prepared dataset, and return those that differ from the manifest.

    `planned` is called once with the bytes of all files, `progress` with those of each file that was read. Raises
    InputError where the manifest itself can't be trusted: then nothing is left to compare with.
    """
    dataset, damages = TokenDataset(path, _read_manifest(path)), []
    planned(sum(record["bytes"] for record in dataset.manifest["files"].values()))
    for name, record in dataset.manifest["files"].items():
        problem = dataset._size_problem(name) or dataset._hash_problem(name)
        progress(record["bytes"])
        if problem is not None:
            damages.append(DatasetDamage(name, problem, dataset._conversations_touched(name)))
    return damages


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a dataset. Raises InputError where it is missing, of another version or damaged."""
    where = path / MANIFEST
    if not where.is_file():
        raise InputError(
            f"{path}: expected a prepared dataset, found no {MANIFEST}: no `draftcache prepare` finished here"
        )
    manifest = read_json(where)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{where}: expected the manifest of a prepared dataset, found another file")
    if manifest.get("version") == _UNSEALED_VERSION and SEAL not in manifest:
        return manifest
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{where}: expected layout version {VERSION}, found {manifest.get('version')}; "
            "prepare it again with this draftcache"
        )
    try:
        return unseal(where.read_bytes(), str(where))
    except StoreError as exc:
        raise InputError(f"{exc}; prepare the dataset again") from exc
