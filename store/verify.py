"""Checks whether a store is what its manifest and commit records say, and returns a report of the damage.

`shard_choice` says which shards are checked, `shard_workers` checks them side by side, `shard_checks` checks one, and
`top_checks` the store's other files. Here is the order of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext, suppress
from pathlib import Path

from draftcache.store.common.errors import StoreError
from draftcache.store.format.commits import (
    SHARDS_DIRECTORY,
    Record,
    committed_shards,
    record_name,
    require_shard,
    shard_name,
    shard_number,
)
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.known_shards import KnownShard, known_shards, recorded_shards
from draftcache.store.shard_checks import REFUSED, Damage, ShardReport
from draftcache.store.shard_choice import ShardChoice
from draftcache.store.shard_workers import check_shards
from draftcache.store.storage.base import Location, Storage, open_storage
from draftcache.store.top_checks import check_store_index, check_top_level, is_indexed
from draftcache.store.verify_journal import VerifyJournal
from draftcache.store.verify_report import VerifyReport


def verify_store(
    location: Location,
    *,
    quick: bool = False,
    shards: tuple[int, int] | None = None,
    sample: float | None = None,
    seed: int = 0,
    journal: Path | None = None,
    workers: int | None = None,
    planned: Callable[[int, int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check a store against its manifest and commit records, and return the report.

    Every file's size and xxh3-128 is checked, every index against its arrays, and every conversation's values. With
    `quick`, only that every record can be read and every file has its size. `shards` limits this to the shards of two
    numbers and between them. `sample` is the share of the shards that is read in full, above 0 and at most 1; the
    others are checked as with `quick`. The same store, `sample` and `seed` give the same shards, and another `seed`
    gives others (`shard_choice.SAMPLE_RULE`). The files beside the shards are checked always, and that every planned
    shard of a finished store has a commit record.

    `journal` is a file that notes each shard that was checked. After a kill, the same call goes on from it: a shard
    that it calls good, and whose commit record is the same still, is not read again. The file is removed when the
    report is made. `workers` is the number of processes, by default one per core; stores of few shards are checked in
    this process. `planned` is called once, before shards are checked, with the bytes of all shards to check and how
    many of them the journal has already; `progress` is called with the bytes of each shard that is done. Beside a
    sample, shards that are checked by size count no bytes.

    All damage is part of the report, that of the manifest too. Raises StoreNotFoundError or StoreVersionError where
    there is no store that could be verified, InputError for settings that do not fit the store or one another, or for a
    journal of another verification, WorkerError where a process dies, and OSError where the journal can't be written.
    """
    choice = ShardChoice(quick=quick, shards=shards, sample=sample, seed=seed)
    storage = open_storage(location)
    report = VerifyReport(location=storage.describe(), quick=quick, choice=choice)
    try:
        manifest = StoreManifest.load(storage)
    except StoreError as exc:
        if type(exc) is not StoreError:  # the store is not there, or of another version, and nothing can be judged
            raise
        report.damages.append(Damage(name="manifest.json", problem=str(exc)))
        return report
    report.shards = manifest.shards
    choice.chosen([], manifest.shards)  # refuses numbers beyond the plan before anything is read
    with nullcontext() if journal is None else VerifyJournal(journal, storage, manifest.hash, choice) as notes:
        report.damages += check_top_level(storage, manifest, quick)
        report.indexed = is_indexed(storage)
        listed = storage.list_sizes(SHARDS_DIRECTORY) if storage.local_root is None else {}
        committed = _committed(storage, manifest, report)
        plan = _Plan(storage, manifest, choice, committed, notes, listed)
        report.not_looked_at = len(committed) - len(plan.in_full)
        report.from_journal = len(plan.noted)
        if planned is not None:
            planned(plan.bytes_of(plan.in_full), plan.bytes_of(plan.noted))
        with closing(check_shards(location, plan.open, plan.known, workers)) as results:
            for found in results:
                plan.take(found)
                if notes is not None:
                    notes.add(found, in_full=plan.in_full[found.number])
                if progress is not None:
                    progress(plan.bytes_of([found.number]))
        plan.count(report)
        if report.finished and not report.damages and not quick:
            report.damages += check_store_index(storage, plan.records_in_full(), whole=report.complete)
        report.strays = _strays(listed or storage.list(SHARDS_DIRECTORY), plan, report.damaged_shards)
        if notes is not None:
            notes.finish()
    return report


class _Plan:
    """The shards that are checked, what the journal knows of them, and what their checks find."""

    def __init__(
        self,
        storage: Storage,
        manifest: StoreManifest,
        choice: ShardChoice,
        committed: list[int],
        notes: VerifyJournal | None,
        listed: dict[str, int],
    ) -> None:
        chosen = choice.chosen(committed, manifest.shards)
        full = choice.in_full(chosen, manifest.hash)
        self.in_full = {number: number in full for number in chosen}
        """The shards to check, and whether each of them is read in full."""
        self.known: dict[int, KnownShard] = {}
        """What an object store holds of these shards. A disk is not asked beforehand."""
        if storage.local_root is None:
            self.known = {shard.number: shard for shard in known_shards(storage, manifest, chosen, listed)}
        self.records = self._read_records(storage, manifest, chosen)
        """The commit records of these shards, where they can be read."""
        self.noted = [
            number
            for number, record in self.records.items()
            if notes is not None and notes.has(number, record, in_full=self.in_full[number])
        ]
        """Those that the journal calls good."""
        known = set(self.noted)
        self.open = {number: full for number, full in self.in_full.items() if number not in known}
        """Those that are checked now."""
        self.all_chosen = choice.shards is None
        self._sampled = choice.sample is not None
        self._damages: list[Damage] = []

    def _read_records(self, storage: Storage, manifest: StoreManifest, numbers: list[int]) -> dict[int, Record]:
        """Return the commit records of shards, without those that can't be read: their checks say why."""
        if storage.local_root is None:
            return {number: shard.record for number, shard in self.known.items() if shard.record is not None}
        found = {}
        for number in numbers:
            with suppress(*REFUSED):
                found[number] = require_shard(storage, number, manifest.hash)
        return found

    def bytes_of(self, numbers: Iterable[int]) -> int:
        """Return the bytes of shards' files, by which progress is measured, as the records say."""
        counted = (number for number in numbers if self.in_full[number] or not self._sampled)
        return sum(_record_bytes(self.records[number]) for number in counted if number in self.records)

    def take(self, found: ShardReport) -> None:
        """Keep what the checks of a shard found, and the commit record that they went by."""
        self._damages += found.damages
        self.records.pop(found.number, None)
        if found.record is not None:
            self.records[found.number] = found.record

    def count(self, report: VerifyReport) -> None:
        """Add the shards to the report, in the order of their numbers."""
        report.damages += sorted(self._damages, key=lambda damage: damage.shard or 0)
        report.read_in_full = len(self.records_in_full())
        report.checked_by_size = len(self.records) - report.read_in_full
        report.unreadable = len(self.in_full) - len(self.records)
        report.conversations = sum(int(record["conversations"]) for record in self.records.values())
        report.bytes = sum(map(_record_bytes, self.records.values()))

    def records_in_full(self) -> dict[int, Record]:
        """Return the commit records of the shards that were read in full."""
        return {number: record for number, record in self.records.items() if self.in_full[number]}


def _record_bytes(record: Record) -> int:
    return sum(item["bytes"] for item in record["files"].values())


def _committed(storage: Storage, manifest: StoreManifest, report: VerifyReport) -> list[int]:
    """Return the numbers of the shards to check, and report records that are missing or outside the manifest's plan.

    The index is written once every shard is committed, so a shard without a record has lost it. A list that came back
    short loses none: each shard that it leaves out is asked for by number.
    """
    listed = committed_shards(storage)
    inside = [number for number in listed if number < manifest.shards]
    report.damages += [_beyond_plan(number, manifest.shards) for number in listed if number >= manifest.shards]
    if report.indexed:
        unlisted = sorted(set(range(manifest.shards)) - set(inside))
        there = recorded_shards(storage, unlisted)
        report.damages += [_lost_record(number) for number in unlisted if number not in there]
        inside = sorted({*inside, *there})
    report.committed = len(inside)
    return inside


def _beyond_plan(number: int, shards: int) -> Damage:
    name = record_name(shard_name(number))
    return Damage(name=name, problem=f"expected records of shards below {shards}, found this one", shard=number)


def _lost_record(number: int) -> Damage:
    name = record_name(shard_name(number))
    return Damage(name=name, problem="expected a commit record, found none", shard=number)


def _strays(listed: Iterable[str], plan: _Plan, damaged_shards: list[int]) -> list[str]:
    """Return the listed files below shards/ that no record names.

    Those of damaged shards, and of shards that were not looked at, are left out.
    """
    named = {name for record in plan.records.values() for name in record["files"]}
    found = []
    for name in listed:
        number = shard_number(name)
        judged = number is None or number in plan.in_full or plan.all_chosen
        if judged and name not in named and number not in damaged_shards:
            found.append(name)
    return found
