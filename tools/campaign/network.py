"""Object stores that fail and lie, several writers at once, kills: what is stored is whole, and read as it is."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftcache.tools.campaign.object_server import Request

from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.files import read_json, write_json
from draftcache.store.storage.object_store import ObjectStorage
from draftcache.tools.campaign.processes import Ended, Process, begin, call, start
from draftcache.tools.campaign.tally import Tally
from draftcache.tools.campaign.world import World, store_content, store_reading

QUICK = {"retries": 4, "backoff": 0.01, "request_timeout": 0.6, "deadline": 20.0}
"""Settings of an object store's client under which a failing network takes seconds, not minutes."""


def mix_again_and_again(world: World, root: Path, random_: random.Random, mixes: int) -> Tally:
    """Run `_mix` with these settings of the client, which the processes inherit."""
    usual = ObjectStorage.__init__.__kwdefaults__ or {}
    ObjectStorage.__init__.__kwdefaults__ = {**usual, **QUICK}
    try:
        return _mix(world, root, random_, mixes)
    finally:
        ObjectStorage.__init__.__kwdefaults__ = usual


def _mix(world: World, root: Path, random_: random.Random, mixes: int) -> Tally:
    """Capture to and read from an object store under this many mixes of faults, and count what goes wrong.

    In each, two writers begin the same store, and one of them may be killed; then both run to the end. Then the store
    is verified and read while the network fails and lies, and once more while it does not.
    """
    from draftcache.tools.campaign.object_server import BUCKET, KINDS

    tally = Tally("object store, faults and lies")
    expected, reading = store_content(world.root / "zarr"), call(lambda: store_reading(world.root / "zarr")).output
    for number in range(mixes):
        tally.attempts += 1
        kinds = tuple(random_.sample(KINDS, random_.randint(1, len(KINDS))))
        with _server(root, random_.randrange(2**31), kinds) as connect:
            url = f"s3://{BUCKET}/mix{number}"
            words = world.capture(url)
            first = connect("faults", words)
            second = connect("faults", words)
            if random_.random() < 0.5:
                first.kill_after(random_.uniform(0, 5))
            ends = [first.wait(), second.wait()]
            _judge(tally, kinds, [ended for ended in ends if ended.code != -signal.SIGKILL])
            ends = [process.wait() for process in (connect("faults", words), connect("faults", words))]
            _judge(tally, kinds, ends)
            for network in ("faults", "lies", "none"):
                _judge(tally, (network, *kinds), [connect(network, ["verify", url, "--workers", 1]).wait()])
                found = connect(network, lambda: store_reading(url)).wait()  # noqa: B023  (it ends here)
                _judge(tally, (network, *kinds), [found])
                if found.code == 0 and found.output != reading:
                    tally.fault("undetected", f"{network}, {kinds}: read something else than what was written")
            content = connect("none", lambda: store_content(url)).wait()  # noqa: B023  (it ends here)
            if content.output.strip() != str(expected):
                tally.fault("lost", f"{kinds}: the store is not the one that an undisturbed network makes")
    return tally


def _judge(tally: Tally, kinds: tuple[str, ...], ends: list[Ended]) -> None:
    for ended in ends:
        tally.judge(ended, (0,), str(kinds))


@contextmanager
def _server(root: Path, seed: int, kinds: tuple[str, ...]) -> Iterator[Callable[[str, Any], Process]]:
    """Run an S3 server in a process of its own, and yield a function that starts commands or functions against it.

    Its first argument says how the network is: "none" for no faults, "faults" of these kinds, or "lies".
    """
    told = root / "addresses.json"
    told.unlink(missing_ok=True)
    server = Process(lambda: _serve(told, seed, kinds), words="the S3 server")
    try:
        deadline = time.monotonic() + 60
        while not told.exists():
            if time.monotonic() > deadline:
                raise DraftcacheError("expected the S3 server to answer within a minute, found that it does not")
            time.sleep(0.05)
        addresses = read_json(told)

        def connect(network: str, what: Any) -> Process:
            with _environment(addresses["environment"] | {"AWS_ENDPOINT_URL": addresses[network]}):
                return begin(what) if callable(what) else start(what)

        yield connect
    finally:
        server.kill_after(0)
        server.wait()


def _lies(seed: int) -> Callable[[Request], str | None]:
    """Return a plan that tells some lie about one answer in twenty, each once."""
    from draftcache.tools.campaign.fault_plans import SeededPlan
    from draftcache.tools.campaign.object_server import LIES

    about_lists = ("shortlist",)
    about_objects = tuple(kind for kind in LIES if kind not in about_lists)
    objects, lists = (SeededPlan(seed, rate=0.05, most=1, kinds=kinds) for kinds in (about_objects, about_lists))

    def decide(request: Request) -> str | None:
        if request.method not in ("GET", "HEAD"):
            return None
        return (lists if "list-type" in request.query else objects)(request)

    return decide


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(told: Path, seed: int, kinds: tuple[str, ...]) -> int:
    """Serve until this process is killed. Threads begin here, after the fork."""
    from draftcache.tools.campaign.fault_plans import SeededPlan
    from draftcache.tools.campaign.object_server import CREDENTIALS, FlakyProxy, s3_server

    with s3_server() as server, FlakyProxy(server.address, stall=0.9) as faults, FlakyProxy(server.address) as lies:
        faults.plan = SeededPlan(seed, rate=0.15, most=2, kinds=kinds)
        lies.plan = _lies(seed)
        environment = {**CREDENTIALS, "AWS_ALLOW_HTTP": "true"}
        addresses = {"none": server.url, "faults": faults.url, "lies": lies.url, "environment": environment}
        write_json(told, addresses)
        signal.pause()
    return 0
