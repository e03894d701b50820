"""manifest.json: what a store holds and how it was made. `settings` must agree for two jobs to share a store."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from draftcache.store.common.errors import ManifestMismatchError, StoreError, StoreNotFoundError, StoreVersionError
from draftcache.store.common.files import hash_json
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.format.norm_band import NormBand, bands_from_json
from draftcache.store.format.schema import ArraySpec, array_specs
from draftcache.store.format.tap_codecs import ChannelScales, TapCodec, tap_codec
from draftcache.store.format.teacher import DraftVocab, TeacherForm
from draftcache.store.storage.base import Storage

FORMAT = "draftcache-store"
VERSION = 5
MANIFEST_NAME = "manifest.json"
LAYOUTS = ("zarr", "webdataset")
CALIBRATED = ("channel_scales", "norm_bands")
"""Fields that the first job on a store measures, and every later one takes over."""


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
    mode: str
    """How taps are stored: one of `codecs.MODES`."""
    compute_dtype: str
    window: int | None
    """Rows that no start row within this window reads were dropped; None kept every earlier row."""
    top_k: int
    """Teacher entries per position; 0 where final-norm states are kept instead."""
    draft_vocab_size: int
    """Of the main draft vocabulary."""
    draft_vocab_hash: str
    shard_tokens: int
    shards: int
    ssm: dict[str, Any] | None
    """fp32 state contract of a Mamba verifier: dt limit, carry dtype, canary, scan; None for others."""
    teacher: str = "draft"
    """What is kept of the verifier's distribution: one of `teacher_form.TEACHERS`."""
    more_draft_vocabs: dict[str, str] = field(default_factory=dict)
    """Further declared draft vocabularies: the hash of each one's map, by its size in decimal."""
    layout: str = "zarr"
    """Form of the shards: "zarr" groups or "webdataset" tar files."""
    channel_scales: dict[str, Any] | None = None
    """int8 mode: the calibrated scale of every channel of every tap, as `codecs.ChannelScales` writes it."""
    norm_bands: dict[str, Any] | None = None
    """What the norms of every tap were over the calibration's conversations, as `norm_band.bands_to_json` writes it."""
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

    @cached_property
    def codec(self) -> TapCodec:
        """Between states and the arrays that hold them."""
        scales = None if self.channel_scales is None else ChannelScales.from_json(self.channel_scales)
        return tap_codec(self.mode, layers=self.layers, hidden_size=self.hidden_size, channel_scales=scales)

    @cached_property
    def bands(self) -> dict[int, NormBand]:
        """By block number, what the gates judge by; {} where nothing was calibrated."""
        return {} if self.norm_bands is None else bands_from_json(self.norm_bands)

    @cached_property
    def teacher_form(self) -> TeacherForm:
        """Which arrays hold the teacher, and the declared draft vocabularies."""
        more = (DraftVocab.further(int(size), value) for size, value in self.more_draft_vocabs.items())
        return TeacherForm(
            kind=self.teacher,
            top_k=self.top_k,
            vocab_size=int(self.verifier["vocab_size"]),
            hidden_size=self.hidden_size,
            compute_dtype=self.compute_dtype,
            vocabularies=(DraftVocab(size=self.draft_vocab_size, hash=self.draft_vocab_hash), *more),
        )

    def array_specs(self) -> dict[str, ArraySpec]:
        """Every array of a shard of this store, as it is stored."""
        return array_specs(codec=self.codec, teacher=self.teacher_form)

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

    def with_calibration_of(self, other: StoreManifest) -> StoreManifest:
        """These settings with what another manifest's job measured."""
        return replace(self, channel_scales=other.channel_scales, norm_bands=other.norm_bands)

    def require_same(self, other: StoreManifest, where: str, *, calibrated: bool = True) -> None:
        """Raise ManifestMismatchError naming the differing fields, unless the settings agree.

        Without `calibrated`, what was measured may differ: the other job is about to take it over.
        """
        mine, theirs = self.settings(), other.settings()
        names = [name for name in mine if calibrated or name not in CALIBRATED]
        differing = [name for name in names if mine[name] != theirs[name]]
        if differing:
            detail = "; ".join(f"{name}: store has {mine[name]!r}, this job has {theirs[name]!r}" for name in differing)
            raise ManifestMismatchError(
                f"{where}: this store was made with other settings ({detail}). "
                "Use the same settings to resume it, or another --output for a new store."
            )

    def create(self, storage: Storage) -> bool:
        """Write manifest.json where there is none; False where another job's is there already."""
        body = {"format": FORMAT, "version": VERSION, "hash": self.hash, **self.settings()}
        return storage.create(MANIFEST_NAME, seal(body | {"provenance": self.provenance}))

    @classmethod
    def exists(cls, storage: Storage) -> bool:
        """Whether a store was begun here."""
        return storage.size(MANIFEST_NAME) is not None

    @classmethod
    def load(cls, storage: Storage) -> StoreManifest:
        """Read and check manifest.json.

        Raises StoreNotFoundError, StoreVersionError for another layout, StoreError for anything else that is
        not a draftcache store, or whose bytes are not what was written.
        """
        where = storage.describe(MANIFEST_NAME)
        if not cls.exists(storage):
            raise StoreNotFoundError(
                f"{storage.describe()}: expected a draftcache store, found no {MANIFEST_NAME}"
                + ("; this is a zarr group of another program" if storage.size("zarr.json") is not None else "")
            )
        data = storage.read(MANIFEST_NAME)
        _require_version(data, where)
        body = unseal(data, where)
        names = {item.name for item in fields(cls)}
        missing = sorted(names - body.keys())
        if missing:
            raise StoreError(f"{where}: expected the fields {missing}, found none of them; the file is incomplete")
        values = {name: body[name] for name in names}
        values["taps"] = tuple(Tap(layer=tap["layer"], point=tap["point"]) for tap in body["taps"])
        values["splits"] = tuple(body["splits"])
        return cls(**values)


def _require_version(data: bytes, where: str) -> None:
    """Said before the seal is looked at: another version may be sealed in another way."""
    try:
        body = json.loads(data)
    except ValueError as exc:
        raise StoreError(f"{where}: expected a store's manifest, found no JSON ({exc})") from exc
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise StoreError(f"{where}: expected format {FORMAT!r}, found something else; is this another program's?")
    found = body.get("version")
    if found != VERSION:
        newer = isinstance(found, int) and found > VERSION
        raise StoreVersionError(
            f"{where}: expected layout version {VERSION}, found {found!r}; "
            + ("upgrade draftcache to read it" if newer else "capture it again, or read it with the older draftcache")
        )
