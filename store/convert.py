"""Copies a store into another layout, mode or size of shards, and reads back what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError, StoreError
from draftcache.store.format.commits import Record, read_record, require_record, shard_name
from draftcache.store.format.index import read_shard_index
from draftcache.store.format.norm_band import NormBand
from draftcache.store.format.schema import Conversation, tap_name
from draftcache.store.format.tap_codecs import LOSSY_MODES, Calibration, bf16_to_float32, float32_to_bf16
from draftcache.store.format.teacher_stats import describe, tail_mass
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location
from draftcache.store.writer import StoreWriter

_CALIBRATION_ROWS = 65_536
_WRITER_FIELDS = ("directory", "files", "lengths", "conversations", "loss_tokens", "payload_bytes", "manifest_hash")


@dataclass
class ConvertSummary:
    """What one run did; errors are rms of the difference over each channel's rms, per conversation."""

    shards: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    tokens: int = 0
    checked: int = 0
    """Conversations that were read back and compared."""
    largest_error: dict[int, float] = field(default_factory=dict)
    """By tap; only where the target's mode is lossy."""


@dataclass(frozen=True)
class _ShardPlan:
    """One shard of the target: positions `first .. last` of the source's index, and its source's shards."""

    first: int
    last: int
    split: int


class Conversion:
    """A copy that is killed at any instant goes on where it was, by the same call."""

    def __init__(
        self,
        source: Location,
        target: Location,
        *,
        layout: str | None = None,
        mode: str | None = None,
        shard_tokens: int | None = None,
        check: bool = True,
        allow_lossy_source: bool = False,
    ) -> None:
        """Raises InputError where the source's states can not become the target's."""
        self.source = StoreReader(source)
        self.target = target
        self.check = check
        self._records = list(self.source.records())
        manifest = self.source.manifest
        mode = mode or manifest.mode
        if mode != manifest.mode and manifest.mode in LOSSY_MODES and not allow_lossy_source:
            raise InputError(
                f"{self.source.location}: expected exact states to make {mode} of, found {manifest.mode}; "
                "pass --allow-lossy-source to build on what that mode lost"
            )
        if mode == "float32" and manifest.mode != "float32":
            raise InputError(f"{self.source.location}: expected float32 states to store as float32, found bf16")
        if shard_tokens is not None and shard_tokens < 1:
            raise InputError(f"--shard-tokens: expected at least 1, found {shard_tokens}")
        self._resharded = shard_tokens is not None
        self.plan = list(self._plan(shard_tokens))
        self.manifest = replace(
            manifest,
            layout=layout or manifest.layout,
            mode=mode,
            channel_scales=manifest.channel_scales if mode == manifest.mode else self._channel_scales(mode),
            shards=len(self.plan),
            shard_tokens=shard_tokens or manifest.shard_tokens,
        )

    def _plan(self, shard_tokens: int | None) -> Iterator[_ShardPlan]:
        """The source's own shards, or conversations in order until there are `shard_tokens`, splits apart."""
        index = self.source.index
        if shard_tokens is None:
            ends = np.cumsum([record["conversations"] for record in self._records])
            for record, end in zip(self._records, ends.tolist(), strict=True):
                first = end - record["conversations"]
                yield _ShardPlan(first, end, int(index["split"][first]) if end > first else 0)
            return
        first = tokens = 0
        for place in range(len(index)):
            tokens += int(index["tokens"][place])
            last_of_split = place + 1 == len(index) or index["split"][place + 1] != index["split"][place]
            if tokens >= shard_tokens or last_of_split:
                yield _ShardPlan(first, place + 1, int(index["split"][place]))
                first, tokens = place + 1, 0

    def _channel_scales(self, mode: str) -> dict[str, Any] | None:
        """int8: rms of every channel over conversations at even steps."""
        if mode != "int8":
            return None
        manifest, index = self.source.manifest, self.source.index
        calibration = Calibration(manifest.layers, manifest.hidden_size)
        share = min(1.0, _CALIBRATION_ROWS / max(int(index["rows"].sum()), 1))
        for place in np.linspace(0, len(index) - 1, max(1, round(len(index) * share))).round().astype(int):
            item = self.source.read(int(place), [tap_name(layer) for layer in manifest.layers])
            for layer in manifest.layers:
                calibration.add(layer, item.arrays[tap_name(layer)])
        return calibration.finish().to_json()

    def run(self, progress: Callable[[int], None] | None = None) -> ConvertSummary:
        """Write the shards that are missing, then the index. `progress` gets the bytes of each shard written.

        Raises StoreError naming the conversation where what was read back is not what was written.
        """
        summary = ConvertSummary(tokens=int(self.source.index["tokens"].sum()))
        with StoreWriter(self.target, self.manifest, self._top_level_files) as writer:
            for shard, plan in enumerate(self.plan):
                begun = writer.shard(shard)
                if begun is None:
                    continue
                with begun:
                    for place in range(plan.first, plan.last):
                        begun.append(self._converted(place))
                    begun.commit(self._extra(shard, plan))
                summary.shards += 1
                if self.check:
                    self._compare(writer, shard, plan, summary)
                if progress is not None:
                    progress(begun.payload_bytes)
            writer.finish()
            summary.bytes_before = self.source.bytes_on_disk()
            records = (read_record(writer.storage, shard_name(shard)) for shard in range(len(self.plan)))
            summary.bytes_after = sum(
                item["bytes"] for record in records if record for item in record["files"].values()
            )
        return summary

    def _top_level_files(self, directory: Path) -> Sequence[Path]:
        copies = []
        files = self.source.files
        for path in (files.frozen, files.vocab_map, *files.more_vocab_maps.values()):
            copies.append(directory / path.name)
            copies[-1].write_bytes(path.read_bytes())
        return copies

    def _converted(self, place: int) -> Conversation:
        """Parts as they are where the mode stays, else states of the dtype that the target's mode takes."""
        if self.manifest.mode == self.source.manifest.mode:
            return self.source.read(place, decode=False)
        item = self.source.read(place)
        arrays = dict(item.arrays)
        for name in (tap_name(layer) for layer in self.manifest.layers):
            if arrays[name].dtype == np.float32:
                arrays[name] = float32_to_bf16(arrays[name])
        return replace(item, arrays=arrays)

    def _extra(self, shard: int, plan: _ShardPlan) -> Record:
        """What capture recorded beside the files: carried over, or dealt out anew with the conversations."""
        if not self._resharded:
            return {name: value for name, value in self._records[shard].items() if name not in _WRITER_FIELDS}
        index = self.source.index
        places = range(plan.first, plan.last)
        form = self.source.manifest.teacher_form
        names = [*form.entry_specs(), "teacher_max", "log_z_draft"] if form.kind != "hidden" else []
        in_draft = form.in_draft(self.source.vocab_map())
        tails = [tail_mass(self.source.read(place, names).arrays, in_draft) for place in places]
        last_source = self._records[int(index["shard"][plan.last - 1])]
        return {
            "tokens": int(index["tokens"][plan.first : plan.last].sum()),
            "quarantined": self._quarantined(shard),
            "gates": self._norms(plan),
            "tail_mass": describe(np.concatenate(tails) if tails else np.empty(0)),
            "provenance": last_source.get("provenance", {}),
        }

    def _norms(self, plan: _ShardPlan) -> dict[str, Any]:
        """Sums of whole shards can't be dealt out: those go where a shard's last conversation goes, so none is lost."""
        ends = np.cumsum([record["conversations"] for record in self._records]).tolist()
        joined: dict[str, NormBand] = {}
        for record, end in zip(self._records, ends, strict=True):
            if plan.first < end <= plan.last:
                for layer, values in record.get("gates", {}).items():
                    joined.setdefault(layer, NormBand()).join(NormBand(*values))
        return {layer: band.to_json() for layer, band in joined.items()}

    def _quarantined(self, shard: int) -> list[dict[str, Any]]:
        """Entries that follow the shard before this one's last conversation, up to this one's last."""
        manifest, index = self.source.manifest, self.source.index

        last = [index[plan.last - 1] for plan in self.plan]
        ends = [(int(row["split"]), int(row["dataset_index"])) for row in last]
        low = ends[shard - 1] if shard else (-1, -1)
        high = ends[shard] if shard + 1 < len(ends) else (len(manifest.splits), 0)
        return [
            item
            for record in self._records
            for item in record.get("quarantined", [])
            if low < (manifest.splits.index(item["split"]), item["dataset_index"]) <= high
        ]

    def _compare(self, writer: StoreWriter, shard: int, plan: _ShardPlan, summary: ConvertSummary) -> None:
        """Read the shard back from where it was written."""
        index = read_shard_index(writer.storage, require_record(writer.storage, shard_name(shard)))
        written = StoreReader.of_shard(writer.storage, self.manifest, index)
        taps = {tap_name(layer): layer for layer in self.manifest.layers}
        for number, place in enumerate(range(plan.first, plan.last)):
            expected, found = self.source.read(place), written.read(number)
            for name, values in expected.arrays.items():
                mine = found.arrays[name]
                if name in taps and mine.dtype != values.dtype:
                    values = float32_to_bf16(values)
                if (
                    name in taps
                    and self.manifest.mode in LOSSY_MODES
                    and self.manifest.mode != self.source.manifest.mode
                ):
                    error = normalised_error(mine, values)
                    summary.largest_error[taps[name]] = max(summary.largest_error.get(taps[name], 0.0), error)
                elif (mine.dtype, mine.shape, mine.tobytes()) != (values.dtype, values.shape, values.tobytes()):
                    raise StoreError(
                        f"{written.location}: conversation {expected.content_hash}: expected {name} as in "
                        f"{self.source.location}, read back other values; check the disk and the memory, then run "
                        "`draftcache verify` on both"
                    )
            summary.checked += 1
        written.close()


def normalised_error(found: NDArray[np.uint16], expected: NDArray[np.uint16]) -> float:
    """Rms of the difference of bf16 states [R, H] after dividing by each channel's rms over these rows."""
    if not expected.size:
        return 0.0
    one, two = (bf16_to_float32(states).astype(np.float64) for states in (found, expected))
    rms = np.sqrt(np.square(two).mean(axis=0))
    return float(np.sqrt(np.square((one - two) / np.where(rms > 0, rms, 1)).mean()))
