"""Copies a store into another layout, mode or size of shards, or some of its taps, and reads back what it wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from draftcache.store.common.errors import InputError, ShardDamagedError, StoreError
from draftcache.store.comparison import compare_conversations
from draftcache.store.convert_plan import ShardPlan, plan_shards
from draftcache.store.convert_summary import ConvertSummary
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.bf16 import float32_to_bf16
from draftcache.store.format.channel_scales import Calibration
from draftcache.store.format.commits import Record, find_shards, read_record, require_shard, require_shards, shard_name
from draftcache.store.format.index import read_shard_index
from draftcache.store.format.norm_band import NormBand
from draftcache.store.format.schema import Conversation
from draftcache.store.format.tap_codecs import LOSSY_MODES
from draftcache.store.format.teacher_stats import describe, tail_mass
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location, Storage
from draftcache.store.tap_choice import choose_taps, names_with_taps
from draftcache.store.writer import StoreWriter

_CALIBRATION_ROWS = 65_536
"""About how many rows a calibration of channel scales reads."""
_COMPARED = "compared_with"
"""Field of a converted shard's commit record: the manifest's hash of the source that the shard was compared with."""
_WRITER_FIELDS = (
    "directory",
    "files",
    "lengths",
    "conversations",
    "loss_tokens",
    "payload_bytes",
    "manifest_hash",
    _COMPARED,
)
"""Fields of a commit record that the writer or a conversion makes. The others are capture's."""


class Conversion:
    """A copy of a store, or of some of its taps, into another layout, mode or size of shards.

    A copy that is killed at any instant goes on where it was, by the same call.
    """

    def __init__(
        self,
        source: Location,
        target: Location,
        *,
        layout: str | None = None,
        mode: str | None = None,
        shard_tokens: int | None = None,
        layers: Sequence[int] | None = None,
        check: bool = True,
        allow_lossy_source: bool = False,
    ) -> None:
        """Open the source and plan the target, at paths or URLs; nothing is written yet.

        `layout` is one of `manifest.LAYOUTS` and `mode` one of `tap_codecs.MODES`, each by default the source's. With
        `shard_tokens`, conversations are dealt into new shards of at least that many tokens; without it, the shards
        stay as they are. `layers` are the blocks whose taps are kept; without it, all are. `check` reads every written
        shard back and compares it. `allow_lossy_source` permits another mode for states that a lossy mode has changed
        already. int8 reads about 65,536 rows here, for its scales.

        Raises InputError where the source's states can not become the target's, a tap of `layers` is not stored, or
        `shard_tokens` is below 1, and the errors of `StoreReader` for the source.
        """
        self.source = StoreReader(source)
        self.target = target
        self.check = check
        self.tokens = int(self.source.index["tokens"].sum())
        """Tokens of the store, by which progress is measured."""
        self._records = list(self.source.records())
        manifest = self.source.manifest if layers is None else choose_taps(self.source, layers)
        self._names = names_with_taps(self.source, manifest.layers)
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
        self.plan = list(plan_shards(self.source.index, self._records, shard_tokens))
        self.manifest = replace(
            manifest,
            layout=layout or manifest.layout,
            mode=mode,
            channel_scales=manifest.channel_scales
            if mode == manifest.mode
            else self._channel_scales(mode, manifest.layers),
            shards=len(self.plan),
            shard_tokens=shard_tokens or manifest.shard_tokens,
        )

    def _channel_scales(self, mode: str, layers: Sequence[int]) -> dict[str, Any] | None:
        """Return the scales of int8, which are the rms of every channel over conversations at even steps; else None."""
        if mode != "int8":
            return None
        manifest, index = self.source.manifest, self.source.index
        calibration = Calibration(layers, manifest.hidden_size)
        share = min(1.0, _CALIBRATION_ROWS / max(int(index["rows"].sum()), 1))
        for number in np.linspace(0, len(index) - 1, max(1, round(len(index) * share))).round().astype(int):
            item = self.source.read(int(number), [tap_name(layer) for layer in layers])
            for layer in layers:
                calibration.add(layer, item.arrays[tap_name(layer)])
        return calibration.finish().to_json()

    def run(self, progress: Callable[[int], None] | None = None) -> ConvertSummary:
        """Write the shards that are missing, then the index.

        Where another run writes some of them at this moment, the copy is not finished yet, and the summary's `missing`
        names them. `progress` is called with the tokens of each shard of the plan, `tokens` in all, when it is written
        or was there already. Raises StoreError, which names the conversation, where values that were read back differ
        from those written, and the errors of `StoreReader` and `StoreWriter`.
        """
        summary = ConvertSummary(tokens=self.tokens)
        with StoreWriter(self.target, self.manifest, self._top_level_files) as writer:
            done = writer.committed() & set(range(len(self.plan)))
            self._compare_earlier(writer.storage, sorted(done), summary)
            for shard, plan in enumerate(self.plan):
                if shard not in done:
                    self._copy(writer, shard, plan, summary)
                if progress is not None:
                    progress(int(self.source.index["tokens"][plan.first : plan.last].sum()))
            summary.finished = writer.finish()
            summary.bytes_before = sum(item["bytes"] for record in self._records for item in record["files"].values())
            self._count(writer.storage, summary)
        if summary.finished and (summary.missing or summary.conversations != len(self.source)):
            raise ShardDamagedError(
                f"{writer.storage.describe()}: expected a finished copy of {len(self.source)} conversations, found "
                f"{summary.conversations} and no record of the shards {summary.missing}; run `draftcache verify` on it"
            )
        return summary

    def _copy(self, writer: StoreWriter, shard: int, plan: ShardPlan, summary: ConvertSummary) -> None:
        """Write a shard, compare it and commit it then, so that a shard that differs is never a part of the target.

        A shard that was committed without a comparison is compared now. Raises StoreError where a conversation differs.
        """
        begun = writer.shard(shard)
        if begun is None:
            if read_record(writer.storage, shard_name(shard)) is not None:  # otherwise another run is writing it
                record = require_shard(writer.storage, shard, self.manifest.hash)
                self._compare_committed(writer.storage, shard, record, summary)
            return
        extra, check = self._extra(shard, plan), None
        if self.check:
            extra[_COMPARED] = self.source.manifest.hash
            check = partial(self._compare, writer.storage, plan, summary)
        with begun:
            for number in range(plan.first, plan.last):
                begun.append(self._converted(number))
            begun.commit(extra, check)
        summary.shards += 1

    def _compare(self, storage: Storage, plan: ShardPlan, summary: ConvertSummary, record: Record) -> None:
        """Read back the shard of a commit record, which need not be written yet, and compare it. Raises StoreError."""
        written = StoreReader.of_shard(storage, self.manifest, read_shard_index(storage, record), record)
        try:
            summary.add_errors(
                compare_conversations(self.source, plan.first, plan.last, written), plan.last - plan.first
            )
        finally:
            written.close()

    def _compare_earlier(self, storage: Storage, shards: list[int], summary: ConvertSummary) -> None:
        """Compare the shards that earlier runs have committed, unless they did so themselves."""
        if self.check:
            for shard, record in zip(shards, require_shards(storage, shards, self.manifest.hash), strict=True):
                self._compare_committed(storage, shard, record, summary)

    def _compare_committed(self, storage: Storage, shard: int, record: Record, summary: ConvertSummary) -> None:
        """Compare a committed shard, unless its record says that it was compared with this source."""
        if not self.check or record.get(_COMPARED) == self.source.manifest.hash:
            return
        try:
            self._compare(storage, self.plan[shard], summary, record)
        except StoreError as exc:
            raise StoreError(
                f"{exc}. The shard {shard_name(shard)} was committed by a run that did not compare it: remove "
                f"{storage.describe()} and convert again"
            ) from exc

    def _count(self, storage: Storage, summary: ConvertSummary) -> None:
        """Count what the commit records of the target hold. Raises ShardDamagedError for a record of another place."""
        shards = range(len(self.plan))
        for shard, record in enumerate(find_shards(storage, shards, self.manifest.hash, expected=summary.finished)):
            if record is None:
                summary.missing.append(shard)
                continue
            summary.bytes_after += sum(item["bytes"] for item in record["files"].values())
            summary.conversations += record["conversations"]

    def _top_level_files(self, directory: Path) -> Sequence[Path]:
        copies = []
        files = self.source.files
        for path in (files.frozen, files.vocab_map, *files.more_vocab_maps.values()):
            copies.append(directory / path.name)
            copies[-1].write_bytes(path.read_bytes())
        return copies

    def _converted(self, number: int) -> Conversation:
        """Return a conversation for the target's writer.

        Its taps are the stored parts where the mode stays, otherwise states of the dtype that the target's mode takes.
        """
        if self.manifest.mode == self.source.manifest.mode:
            return self.source.read(number, self._names, decode=False)
        item = self.source.read(number, self._names)
        arrays = dict(item.arrays)
        for name in (tap_name(layer) for layer in self.manifest.layers):
            if arrays[name].dtype == np.float32:
                arrays[name] = float32_to_bf16(arrays[name])
        return replace(item, arrays=arrays)

    def _extra(self, shard: int, plan: ShardPlan) -> Record:
        """Return the fields that capture recorded: as they are, or those of the conversations of a new shard."""
        if not self._resharded:
            kept = {name: value for name, value in self._records[shard].items() if name not in _WRITER_FIELDS}
            return kept | ({"gates": self._kept_gates(kept["gates"])} if "gates" in kept else {})
        index = self.source.index
        numbers = range(plan.first, plan.last)
        form = self.source.manifest.teacher_form
        names = [*form.entry_specs(), "teacher_max", "log_z_draft"] if form.kind != "hidden" else []
        in_draft = form.in_draft(self.source.vocab_map())
        tails = [tail_mass(self.source.read(number, names).arrays, in_draft) for number in numbers]
        last_source = self._records[int(index["shard"][plan.last - 1])]
        return {
            "tokens": int(index["tokens"][plan.first : plan.last].sum()),
            "quarantined": self._quarantined(shard),
            "gates": self._norms(plan),
            "tail_mass": describe(np.concatenate(tails) if tails else np.empty(0)),
            "provenance": last_source.get("provenance", {}),
        }

    def _kept_gates(self, gates: dict[str, Any]) -> dict[str, Any]:
        """Return the sums of the target's taps among those of a source shard's, which are by block number as text."""
        return {layer: values for layer, values in gates.items() if int(layer) in self.manifest.layers}

    def _norms(self, plan: ShardPlan) -> dict[str, Any]:
        """Return the sums of the gates' norms, by tap.

        The sums of a whole source shard can't be divided, so they go where the shard's last conversation goes: none is
        lost.
        """
        ends = np.cumsum([record["conversations"] for record in self._records]).tolist()
        joined: dict[str, NormBand] = {}
        for record, end in zip(self._records, ends, strict=True):
            if plan.first < end <= plan.last:
                for layer, values in self._kept_gates(record.get("gates", {})).items():
                    joined.setdefault(layer, NormBand()).join(NormBand(*values))
        return {layer: band.to_json() for layer, band in joined.items()}

    def _quarantined(self, shard: int) -> list[dict[str, Any]]:
        """Return the entries that follow the previous shard's last conversation, up to this shard's last one."""
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
