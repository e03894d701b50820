"""What comparisons of trained drafts share: flags, stores, vocabulary map, sweeps and evaluations.

Each is made by the command at most once.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from draftcache.store.common.errors import InputError, WorkerError
from draftcache.store.common.files import read_json
from draftcache.tools.bench.parts.ablation_jobs import Jobs
from draftcache.tools.sweep.plan import PLAN_NAME

T = TypeVar("T")
TOP_K = 256
"""Teacher entries in the stores. Training uses the setting `top_k` of them."""
_MOST_DRAFT_IDS = 32_000  # as the recipes' "auto"
DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-3, "weight_decay": 0.3, "beta2": 0.99, "batch_conversations": 2, "epochs": 1, "ttt_steps": 6,
    "sliding_window": 512, "top_k": 64, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "eval_conversations": 1000, "checkpoint_every": 100_000,
}  # fmt: skip
"""Settings of every trial, for the demo's verifier."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the command line chose."""

    verifier: Path
    dataset: Path
    layers: str
    train_split: str
    eval_split: str
    first_split: str
    first_share: float
    """Share of `first_split` in the first stage of the family `order`."""
    turns_inputs: Mapping[str, Path]
    """Conversations by "train" and "eval", for the family `turns`; may be empty."""
    vocab_map: Path | None
    draft_vocab_size: int
    work: Path
    seeds: int
    device: str
    train: Mapping[str, Any]
    """Settings of every trial, by name."""
    capture: Mapping[str, Any]
    """Flags of every capture beside those that the families choose."""


def add_flags(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the flags of a `Setup`, and --jobs and --output. `required` says whether those without a default must be
    there.
    """
    parser.add_argument("--verifier", type=Path, required=required, metavar="DIR")
    parser.add_argument("--dataset", type=Path, required=required, metavar="PREPARED")
    parser.add_argument("--layers", default="auto", help="blocks to capture, as of `draftcache capture` (%(default)s)")
    parser.add_argument("--train-split", required=required, metavar="NAME")
    parser.add_argument("--eval-split", required=required, metavar="NAME")
    parser.add_argument("--vocab-map", type=Path, metavar="FILE", help="draft vocabulary (the dataset's, or a new one)")
    parser.add_argument("--draft-vocab-size", type=int, help="of a new one (32,000, or 3/4 of the verifier's)")
    parser.add_argument("--work", type=Path, required=required, metavar="DIR", help="for stores, sweeps and logs")
    parser.add_argument("--output", type=Path, required=required, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="commands at once (%(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--train", action="append", default=[], metavar="KEY=VALUE", help="setting of every trial")
    parser.add_argument("--capture", action="append", default=[], metavar="KEY=VALUE", help="flag of every capture")


def setup_of(arguments: argparse.Namespace, defaults: Mapping[str, Any], **more: Any) -> Setup:
    """Return what the flags choose; `defaults` are settings of every trial, and `more` fields that have no flag.

    Raises InputError for counts out of range.
    """
    for name, least in (("seeds", 2), ("jobs", 1)):
        if getattr(arguments, name) < least:
            raise InputError(f"--{name}: expected {least} or more, found {getattr(arguments, name)}")
    vocabulary = int(read_json(arguments.dataset / "manifest.json")["vocab_size"])
    values: dict[str, Any] = {"first_split": arguments.train_split, "first_share": 1.0, "turns_inputs": {}}
    values["train"] = {**defaults, **settings_of(arguments.train, "--train")}
    return Setup(
        verifier=arguments.verifier,
        dataset=arguments.dataset,
        layers=arguments.layers,
        train_split=arguments.train_split,
        eval_split=arguments.eval_split,
        vocab_map=arguments.vocab_map,
        draft_vocab_size=arguments.draft_vocab_size or min(_MOST_DRAFT_IDS, vocabulary * 3 // 4),
        work=arguments.work,
        seeds=arguments.seeds,
        device=arguments.device,
        capture=settings_of(arguments.capture, "--capture"),
        **values | more,
    )


@dataclass
class Bench:
    """Makes what the families need, in the directory `setup.work`. Its methods may be called from many threads."""

    setup: Setup
    jobs: Jobs
    priority: int = 0
    """Of the family that asks: a lower number goes first."""
    _made: dict[str, Future[Path]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of_family(self, priority: int) -> Bench:
        """Return the bench as one family uses it, with what is made already."""
        return Bench(self.setup, self.jobs, priority, self._made, self._lock)

    def by_seed(self, measure: Callable[[int], T]) -> list[T]:
        """Return what `measure` returns for every seed, measured at once as far as the jobs allow."""
        return self.together([partial(measure, seed) for seed in range(self.setup.seeds)])

    def together(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """Return the results of all calls, each made in a thread of its own."""
        with ThreadPoolExecutor(max_workers=len(calls)) as pool:
            return [future.result() for future in [pool.submit(call) for call in calls]]

    def store(self, mode: str = "lossless", teacher: str = "draft") -> Path:
        """Return the store of the dataset in this mode and with this teacher, captured when it is first asked for."""
        setup = self.setup
        splits = dict.fromkeys([setup.train_split, setup.eval_split, setup.first_split])
        return self.captured(f"{mode}-{teacher}", setup.dataset, tuple(splits), mode, teacher)

    def captured(
        self, name: str, dataset: Path, splits: Sequence[str], mode: str = "lossless", teacher: str = "draft"
    ) -> Path:
        """Return the store NAME of a dataset, with every row in any window's reach."""
        output = self.setup.work / "stores" / name

        def capture() -> Path:
            values = {"layers": self.setup.layers, "splits": ",".join(splits), "window": 0, "device": self.setup.device}
            values |= {"mode": mode, "teacher": teacher, "vocab_map": self.vocab_map(), **self.setup.capture}
            if teacher != "hidden":
                values.setdefault("top_k", TOP_K)
            words = [*flags({"verifier": self.setup.verifier, "dataset": dataset}), *flags(values)]
            self.jobs.run(f"capture-{name}", self.priority, "capture", *words, "--output", output)
            return output

        return self.once(str(output), capture)

    def vocab_map(self) -> Path:
        """Return the draft-vocabulary map: the given one, the dataset's own, or one of the training split's counts."""
        setup = self.setup
        own = setup.dataset / "vocab_map.safetensors"
        if setup.vocab_map is not None or own.is_file():
            return setup.vocab_map or own
        output = setup.work / "vocab_map.safetensors"

        def build() -> Path:
            words = [f"{setup.dataset}:{setup.train_split}", "--size", setup.draft_vocab_size, "--output", output]
            self.jobs.run("vocab", self.priority, "vocab", *words)
            return output

        return self.once(str(output), build)

    def once(self, key: str, make: Callable[[], Path]) -> Path:
        """Return what `make` returns, which is called by the first thread that asks for `key`; the others wait."""
        with self._lock:
            first = key not in self._made
            future = self._made.setdefault(key, Future())
        if first:
            try:
                future.set_result(make())
            except BaseException as exc:
                future.set_exception(exc)
        return future.result()

    def swept(
        self, name: str, seed: int, store: Path, axes: Mapping[str, Sequence[Any]] | None = None, **settings: Any
    ) -> list[dict[str, Any]]:
        """Run the sweep NAME-SEED over `axes` on a store, and return its trials.

        They are the rows of its results.json, with `axes`, each one's values, and `run`, its directory.

        A seed draws both the initial weights and the order of conversations, so that its trials read the same data in
        the same order, and trials of one seed can be compared in pairs. Raises WorkerError where a trial did not end.
        """
        output = self.setup.work / "sweeps" / f"{name}-{seed}"
        shared = {"store": str(store.absolute()), "splits": [self.setup.train_split]}
        shared |= {"eval_split": self.setup.eval_split, **self.setup.train, **settings}
        path = output.with_suffix(".toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sweep_file(shared, {**(axes or {}), "seed": [seed]}), encoding="utf-8")
        words = [path, "--output", output, "--device", self.setup.device]
        self.jobs.run(f"sweep-{name}-{seed}", self.priority, "sweep", *words)
        trials: list[dict[str, Any]] = read_json(output / "results.json")["trials"]
        for trial, planned in zip(trials, read_json(output / PLAN_NAME)["trials"], strict=True):
            if trial["state"] != "finished":
                raise WorkerError(f"{output}: expected a finished {trial['trial']}, found it {trial['state']}")
            trial |= {"axes": planned["axes"], "run": output / planned["run"]}
        return trials

    def compared(self, name: str, store: Path, runs: Sequence[Path], draft_tokens: int = 5) -> list[float]:
        """Return the acceptance lengths of finished runs on the held-out split of a store, all on the same batches."""
        split, (first, *others) = self.setup.eval_split, [str(run) for run in runs]
        words = ["--store", store, "--checkpoint", first, "--splits", split, "--device", self.setup.device]
        words += ["--draft-tokens", draft_tokens, "--json", *(["--compare", *others] if others else [])]
        figures = json.loads(self.jobs.run(f"eval-{name}", self.priority, "eval", *words))["splits"][split]
        found = {first: figures["draft"], **figures["compared"]}
        return [float(found[str(run)]["acceptance_length"]) for run in runs]


def sweep_file(shared: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> str:
    """Return the text of a sweep's TOML file. JSON's numbers, texts, truth values and lists of them are TOML's too."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in shared.items()]
    return "\n".join(
        ["[train]", *lines, "", "[axes]", *(f"{name} = {json.dumps(list(axes[name]))}" for name in axes), ""]
    )


def flags(values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line for flags by name; True makes --NAME and False --no-NAME."""
    words: list[str] = []
    for name, value in values.items():
        kebab = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{kebab}"] if isinstance(value, bool) else [f"--{kebab}", str(value)]
    return words


def settings_of(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """Return the values of repeated KEY=VALUE words by name: JSON if it is that, else text. Raises InputError."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InputError(f"{flag}: expected KEY=VALUE, such as batch_conversations=4, found {text!r}")
        try:
            found[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            found[key.replace("-", "_")] = value
    return found
