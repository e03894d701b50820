"""manifest.json: what a store holds and how it was made. `settings` must agree for two jobs to share a store."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from store.errors import ManifestMismatchError, StoreError, StoreNotFoundError, StoreVersionError
from store.files import hash_json, read_json, write_json
from store.schema import ArraySpec, array_specs

FORMAT = "draftcache-store"
VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Which verifier state is stored, in every convention that names it differently."""

    layer: int
    """The output of block `layer`, counted from 0: the residual stream after that block."""

    point: str = "output"

    @property
    def hf_hidden_states_index(self) -> int:
        """Index into Hugging Face's `output_hidden_states`, where 0 is the embeddings."""
        return self.layer + 1

    @property
    def vllm_aux_id(self) -> int:
        """vLLM's id k is the state before its layer k: the output of block k - 1."""
        return self.layer + 1

    def to_json(self) -> dict[str, Any]:
        """All conventions, written out so that no reader has to guess."""
        return {
            "layer": self.layer,
            "point": self.point,
            "hf_hidden_states_index": self.hf_hidden_states_index,
            "vllm_aux_id": self.vllm_aux_id,
        }


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """Everything a reader or a second job must know before it touches a shard."""

    verifier: dict[str, Any]
    """name, architecture, model_type, config_hash, weights_hash, layers, hidden_size, vocab_size, rms_norm_eps."""
    tokenizer_hash: str
    chat_template_hash: str
    dataset_hash: str
    splits: tuple[str, ...]
    taps: tuple[Tap, ...]
    tap_dtype: str
    """"bfloat16" (stored as uint16 bit patterns) or "float32"."""
    compute_dtype: str
    window: int | None
    """Rows that no start row within this window reads were dropped; None kept every earlier row."""
    top_k: int
    draft_vocab_size: int
    draft_vocab_hash: str
    shard_tokens: int
    shards: int
    ssm: dict[str, Any] | None
    """fp32 state contract of a Mamba verifier: dt limit, carry dtype, canary, scan; None for others."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, device and time of the first run; not compared between jobs."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Block numbers of the taps, ascending."""
        return tuple(tap.layer for tap in self.taps)

    @property
    def hidden_size(self) -> int:
        """Width of the verifier's residual stream."""
        return int(self.verifier["hidden_size"])

    def array_specs(self) -> dict[str, ArraySpec]:
        """Every array of a shard of this store."""
        return array_specs(
            layers=self.layers,
            hidden_size=self.hidden_size,
            tap_dtype=self.tap_dtype,
            draft_vocab_size=self.draft_vocab_size,
            top_k=self.top_k,
        )

    def settings(self) -> dict[str, Any]:
        """The fields that two jobs over one store must agree on, as JSON values."""
        values = asdict(self)
        del values["provenance"]
        values["taps"] = [tap.to_json() for tap in self.taps]
        values["splits"] = list(self.splits)
        return values

    @property
    def hash(self) -> str:
        """xxh3-128 of the settings: the identity of the store's content."""
        return hash_json(self.settings())

    def require_same(self, other: StoreManifest, path: Path) -> None:
        """Raise ManifestMismatchError naming the first differing fields, unless the settings agree."""
        mine, theirs = self.settings(), other.settings()
        differing = [name for name in mine if mine[name] != theirs[name]]
        if differing:
            detail = "; ".join(f"{name}: store has {mine[name]!r}, this job has {theirs[name]!r}" for name in differing)
            raise ManifestMismatchError(
                f"{path}: this store was made with other settings ({detail}). "
                "Use the same settings to resume it, or another --output for a new store."
            )

    def save(self, root: Path) -> None:
        """Write manifest.json atomically."""
        body = {"format": FORMAT, "version": VERSION, "hash": self.hash, **self.settings()}
        write_json(root / MANIFEST_NAME, body | {"provenance": self.provenance})

    @classmethod
    def load(cls, root: Path) -> StoreManifest:
        """Read and check manifest.json.

        Raises StoreNotFoundError, StoreVersionError for a newer layout, StoreError for anything else that is
        not a draftcache store or whose settings do not hash to what the file says.
        """
        path = root / MANIFEST_NAME
        if not path.is_file():
            raise StoreNotFoundError(f"{root}: expected a draftcache store, found no {MANIFEST_NAME}")
        body = read_json(path)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise StoreError(f"{path}: expected format {FORMAT!r}, found something else; is this another program's?")
        if not isinstance(body.get("version"), int) or body["version"] > VERSION:
            raise StoreVersionError(
                f"{path}: expected layout version at most {VERSION}, found {body.get('version')!r}; "
                "upgrade draftcache to read it"
            )
        names = {item.name for item in fields(cls)}
        missing = sorted(names - body.keys())
        if missing:
            raise StoreError(f"{path}: expected the fields {missing}, found none of them; the file is incomplete")
        values = {name: body[name] for name in names}
        values["taps"] = tuple(Tap(layer=tap["layer"], point=tap["point"]) for tap in body["taps"])
        values["splits"] = tuple(body["splits"])
        manifest = cls(**values)
        if manifest.hash != body.get("hash"):
            raise StoreError(
                f"{path}: expected settings that hash to {body.get('hash')}, found {manifest.hash}; "
                "the manifest was edited or damaged"
            )
        return manifest
