"""manifest.json: what a store holds and how it was made. Two jobs can share a store if their settings agree."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from draftcache.store.common.errors import ManifestMismatchError, StoreError, StoreNotFoundError, StoreVersionError
from draftcache.store.common.files import hash_json
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.common.strict_json import parse_json
from draftcache.store.format.array_spec import ArraySpec
from draftcache.store.format.channel_scales import ChannelScales
from draftcache.store.format.commits import committed_shards
from draftcache.store.format.frozen import FROZEN_NAME
from draftcache.store.format.norm_band import NormBand, bands_from_json
from draftcache.store.format.schema import array_specs
from draftcache.store.format.tap_codecs import TapCodec, tap_codec
from draftcache.store.format.teacher import DraftVocab, TeacherForm
from draftcache.store.storage.asking import ask_again
from draftcache.store.storage.base import Storage

FORMAT = "draftcache-store"
VERSION = 5
MANIFEST_NAME = "manifest.json"
LAYOUTS = ("zarr", "webdataset")
CALIBRATED = ("channel_scales", "norm_bands")
"""Fields of the manifest that the first job on a store measures and every later job takes over."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One captured block output of the verifier, in every convention that numbers it differently."""

    layer: int
    """Number of the block, counted from 0. The tap is the residual stream after that block."""

    point: str = "output"
    """Where in the block the state is taken; always its output."""

    @property
    def hf_hidden_states_index(self) -> int:
        """Index into Hugging Face's `output_hidden_states`, where index 0 is the embeddings."""
        return self.layer + 1

    @property
    def vllm_aux_id(self) -> int:
        """Id among vLLM's auxiliary hidden states. Its id k is the state before layer k: the output of block k - 1."""
        return self.layer + 1

    def to_json(self) -> dict[str, Any]:
        """Return the numbers of all conventions, written out so that no reader has to guess."""
        return {
            "layer": self.layer,
            "point": self.point,
            "hf_hidden_states_index": self.hf_hidden_states_index,
            "vllm_aux_id": self.vllm_aux_id,
        }


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """Everything that a reader or a second job must know before it touches a shard."""

    verifier: dict[str, Any]
    """name, architecture, model_type, config_hash, weights_hash, layers, hidden_size, vocab_size, rms_norm_eps.

    `logit_scale` and `logit_cap` are there if the verifier scales or caps its logits (`head_form.HeadForm`), and
    `final_norm` ("layer_norm" or "other") if its final norm is no RMS norm. `max_position_embeddings` is None where it
    names no limit. `head_size` is there if the head reads states of another width than `hidden_size`.
    """
    tokenizer_hash: str
    chat_template_hash: str
    dataset_hash: str
    """Hash of the prepared dataset."""
    splits: tuple[str, ...]
    """Names of the splits; an index row refers to them by number."""
    taps: tuple[Tap, ...]
    """The captured block outputs, by ascending block number."""
    mode: str
    """How taps are stored: one of `tap_codecs.MODES`."""
    compute_dtype: str
    """The dtype that the verifier computed in, as torch names it: "bfloat16" or "float32"."""
    window: int | None
    """W: rows that no start row within this window reads were dropped. None kept every earlier row."""
    top_k: int
    """K, teacher entries per position; 0 where final-norm states are kept instead."""
    draft_vocab_size: int
    """Size of the main draft vocabulary."""
    draft_vocab_hash: str
    """`VocabMap.hash` of the main draft vocabulary's map."""
    shard_tokens: int
    """Conversations fill a shard, in order, until it holds at least this many tokens."""
    shards: int
    """Number of shards of the finished store."""
    ssm: dict[str, Any] | None
    """The fp32 state contract of a Mamba verifier: dt limit, carry dtype, canary, scan. None for other verifiers."""
    teacher: str = "draft"
    """What is kept of the verifier's distribution: one of `teacher.TEACHERS`."""
    more_draft_vocabs: dict[str, str] = field(default_factory=dict)
    """The hash of each further declared draft vocabulary's map, by the vocabulary's size in decimal."""
    layout: str = "zarr"
    """Form of the shards, one of `LAYOUTS`: "zarr" groups or "webdataset" tar files."""
    channel_scales: dict[str, Any] | None = None
    """For int8 mode, the calibrated scale of every channel of every tap, as `ChannelScales.to_json` gives it."""
    norm_bands: dict[str, Any] | None = None
    """The norms of every tap over the calibration's conversations, as `norm_band.bands_to_json` gives them."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, device and time of the first run. They are not compared between jobs."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Block numbers of the taps, ascending."""
        return tuple(tap.layer for tap in self.taps)

    @property
    def hidden_size(self) -> int:
        """Width of the verifier's residual stream."""
        return int(self.verifier["hidden_size"])

    @property
    def head_size(self) -> int:
        """Width of the final norm's output, which the head reads: `hidden_size` unless the verifier says otherwise."""
        return int(self.verifier.get("head_size", self.hidden_size))

    @cached_property
    def codec(self) -> TapCodec:
        """The codec between the taps' states and the arrays that hold them."""
        scales = None if self.channel_scales is None else ChannelScales.from_json(self.channel_scales)
        return tap_codec(self.mode, layers=self.layers, hidden_size=self.hidden_size, channel_scales=scales)

    @cached_property
    def bands(self) -> dict[int, NormBand]:
        """The bands that the gates judge by, by block number; {} where nothing was calibrated."""
        return {} if self.norm_bands is None else bands_from_json(self.norm_bands)

    @cached_property
    def teacher_form(self) -> TeacherForm:
        """Which arrays hold the teacher, and the declared draft vocabularies."""
        more = (DraftVocab.further(int(size), value) for size, value in self.more_draft_vocabs.items())
        return TeacherForm(
            kind=self.teacher,
            top_k=self.top_k,
            vocab_size=int(self.verifier["vocab_size"]),
            hidden_size=self.head_size,
            compute_dtype=self.compute_dtype,
            vocabularies=(DraftVocab(size=self.draft_vocab_size, hash=self.draft_vocab_hash), *more),
        )

    def array_specs(self) -> dict[str, ArraySpec]:
        """Return the description of every array of a shard of this store, by name."""
        return array_specs(codec=self.codec, teacher=self.teacher_form)

    def settings(self) -> dict[str, Any]:
        """Return the fields that two jobs over one store must agree on, as JSON values."""
        values = asdict(self)
        del values["provenance"]
        values["taps"] = [tap.to_json() for tap in self.taps]
        values["splits"] = list(self.splits)
        return values

    @property
    def hash(self) -> str:
        """xxh3-128 of the settings: the identity of the store's content."""
        return hash_json(self.settings())

    @property
    def settings_hash(self) -> str:
        """xxh3-128 of the settings without the calibrated fields.

        It is the same for all jobs that may begin a store at once, of which one measures the calibration that counts.
        """
        return hash_json({name: value for name, value in self.settings().items() if name not in CALIBRATED})

    def with_calibration_of(self, other: StoreManifest) -> StoreManifest:
        """Return these settings with the calibrated fields of another manifest."""
        return replace(self, channel_scales=other.channel_scales, norm_bands=other.norm_bands)

    def require_same(self, other: StoreManifest, where: str, *, calibrated: bool = True) -> None:
        """Raise ManifestMismatchError, which names the fields that differ, unless the settings agree.

        `where` is the store, for the message. Without `calibrated`, the fields of `CALIBRATED` may differ, because the
        other job is about to take them over.
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
        """Write manifest.json where there is none. Returns False where another job's is there already."""
        body = {"format": FORMAT, "version": VERSION, "hash": self.hash, **self.settings()}
        return storage.create(MANIFEST_NAME, seal(body | {"provenance": self.provenance}))

    @classmethod
    def exists(cls, storage: Storage) -> bool:
        """Return whether a store was begun here."""
        return _manifest_bytes(storage) is not None

    @classmethod
    def load(cls, storage: Storage) -> StoreManifest:
        """Read and check manifest.json.

        Raises StoreNotFoundError where there is none, StoreVersionError for another version of the layout, and
        StoreError where the file is no draftcache manifest or its bytes are not the ones that were written.
        """

        def look() -> StoreManifest | None:
            data = _manifest_bytes(storage)
            return None if data is None else cls._parse(data, storage.describe(MANIFEST_NAME))

        found = ask_again(storage, look)
        if found is None:
            raise StoreNotFoundError(
                f"{storage.describe()}: expected a draftcache store, found no {MANIFEST_NAME}"
                + ("; this is a zarr group of another program" if storage.size("zarr.json") is not None else "")
            )
        return found

    @classmethod
    def _parse(cls, data: bytes, where: str) -> StoreManifest:
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


def _manifest_bytes(storage: Storage) -> bytes | None:
    """Return the bytes of manifest.json, or None where there is none.

    It is written before any shard is. So where shards are committed and it is not there, it is asked for again.
    """
    try:
        return storage.read(MANIFEST_NAME)
    except StoreNotFoundError:
        if not storage.pauses or not committed_shards(storage):
            return None
    try:
        return ask_again(storage, lambda: storage.read(MANIFEST_NAME))
    except StoreNotFoundError:
        return None


def _require_version(data: bytes, where: str) -> None:
    """Check the version before the seal is looked at, as another version may be sealed in another way."""
    try:
        body = parse_json(data)
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


def top_level_names(manifest: StoreManifest) -> tuple[str, ...]:
    """Return the names of the files that a store has beside its shards, the frozen weights' first.

    Each file has a commit record of its own, whose name is the file's stem.
    """
    return (FROZEN_NAME, *(vocab.map_name for vocab in manifest.teacher_form.vocabularies))
