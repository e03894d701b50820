"""`python -m draftcache.tools.campaign`: kill, damage and mislead every command, and count what goes wrong.

It prints a table of attempts and faults, which the README shows, and returns 1 if there is any fault.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from draftcache.store.common.files import write_json
from draftcache.tools.campaign.tally import FAULTS, Tally, table

PARTS = ("kills", "mutations", "inputs", "network")


def main() -> int:
    """Run the campaign's parts and print their table. Returns 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m draftcache.tools.campaign")
    parser.add_argument("--kills", type=int, default=1200, help="SIGKILLs over all commands (default: 1200)")
    parser.add_argument("--mutations", type=int, default=3000, help="changed stores, datasets and checkpoints")
    parser.add_argument("--inputs", type=int, default=300, help="flags, files and rows that are wrong")
    parser.add_argument("--network", type=int, default=20, help="mixes of faults of an object store")
    parser.add_argument(
        "--only", help=f"parts or rows to run, comma-separated: {','.join(PARTS)}, train, store:zarr, .."
    )
    parser.add_argument("--directory", type=Path, help="where to work: a filesystem to try (default: a temporary one)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other instants and bytes")
    parser.add_argument("--output", type=Path, help="also write the counts to this JSON file")
    arguments = parser.parse_args()

    import torch

    from draftcache.tools.campaign.plan import run_parts

    torch.set_num_threads(1)  # before a process with threads would be forked
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="draftcache-campaign-", dir=arguments.directory) as directory:
        counts = {part: getattr(arguments, part) for part in PARTS}
        tallies = run_parts(Path(directory), counts, arguments.only, random.Random(arguments.seed))
    minutes = (time.monotonic() - started) / 60
    print(f"\n{table(tallies)}\n\nseed {arguments.seed}, {minutes:.0f} minutes")
    if arguments.output is not None:
        write_json(arguments.output, [_row(tally) for tally in tallies])
    return 1 if any(tally.faults.total() for tally in tallies) else 0


def _row(tally: Tally) -> dict[str, object]:
    return {"name": tally.name, "attempts": tally.attempts, **{kind: tally.faults[kind] for kind in FAULTS}}


if __name__ == "__main__":
    sys.exit(main())
