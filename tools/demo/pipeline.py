"""`draftcache demo`: the whole product on a tiny trained verifier and real text, on two CPU cores.

The shipped recipe `demo` (tools/recipes/shipped/demo.toml) has the steps, from real conversations and the verifier's
own greedy traces to an export. Every step is the command that a user would type. It is printed before it runs, and
finished steps are skipped when the demo runs again. The truth check and the summary follow.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftcache.capture.verifier.load import Verifier

from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.files import read_json, write_json
from draftcache.store.common.worker_pool import WorkerPool

ASSETS = Path(__file__).parent / "assets"
VERIFIER = ASSETS / "verifier"
LAYERS = (2, 5, 10)
"""An early Mamba block, a middle attention block and a late Mamba block, as 2/26/48 of the 30B verifier's 52 blocks."""

TRACE_SPLITS = ("val_traces", "mt_bench", "humaneval")
IN_DOMAIN = "val_traces"


_BLOCKS = {"ttt_steps": 0, "num_hidden_layers": 2, "block_size": 6}
DRAFTS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "dflash": {"draft": "dflash", **_BLOCKS},
    "dspark": {"draft": "dspark", **_BLOCKS, "markov_rank": 64},
}
"""By architecture, what its training steps set otherwise than the recipe."""


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much of the shipped text a demo run uses; how it trains is in the recipe."""

    train_conversations: int = 450
    val_conversations: int = 60
    trace_prompts: int = 400
    held_out_prompts: int = 72
    max_prompt_tokens: int = 320
    max_new_tokens: int = 128
    truth_prompts: int = 8
    truth_tokens: int = 64


def read_conversations(path: Path, first: int, count: int) -> list[dict[str, Any]]:
    """Return the rows `first` to `first + count - 1` of a shipped JSONL.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [line for number, line in enumerate(file) if first <= number < first + count]
    return [json.loads(line) for line in rows]


def load_demo_verifier() -> Verifier:
    """Load the shipped verifier in float32 on the CPU, with its dt limit lifted and its float32 carry proved."""
    import torch

    from draftcache.capture.verifier.load import load_verifier
    from draftcache.capture.verifier.ssm_precision import enforce_contract

    verifier = load_verifier(VERIFIER, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=False)
    enforce_contract(verifier.model, VERIFIER, allow_fallback=False)
    return verifier


_worker_model: Any = None


def _start_worker() -> None:
    global _worker_model
    import torch

    torch.set_num_threads(1)
    _worker_model = load_demo_verifier().model


def _answer(prompts: list[list[int]], *, max_new_tokens: int, eos_token_id: int) -> list[list[int]]:
    from draftcache.tools.demo.traces import generate_batch

    return generate_batch(_worker_model, prompts, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)


class Demo:
    """One run of the demo in a directory."""

    def __init__(self, output: Path, size: DemoSize, draft: str = "eagle3") -> None:
        """`draft` is one of `DRAFTS`."""
        self.output = output
        self.size = size
        self.draft = draft
        self.seconds: dict[str, float] = {}

    def path(self, *parts: str) -> Path:
        """Return a path below the run's directory."""
        return self.output.joinpath(*parts)

    def run(self) -> dict[str, Any]:
        """Run the recipe and the checks; return the summary, as written to summary.json.

        It holds what `report.summarize` returns, sizes and seconds.
        """
        started = time.monotonic()
        self._run_recipe()
        summary = self._summary()
        summary["seconds"] = {**self.seconds, "total": round(time.monotonic() - started, 1)}
        write_json(self.path("summary.json"), summary)
        self._write_report()
        return summary

    def _write_report(self) -> None:
        """Write report.html, on both stages, their evaluations and both stores, by the command that a user types."""
        from draftcache.tools.cli import main

        runs = [self.path(stage) for stage in ("stage1", "stage2")]
        evaluations = [self.path("eval", f"{run.name}-{store}.json") for run in runs for store in ("real", "traces")]
        stores = [self.path("stores", name) for name in ("real", "traces")]
        words = ["report", *runs, *evaluations, *stores, "--tokenizer", VERIFIER, "-o", self.path("report.html")]
        print(f"\n$ draftcache {' '.join(map(str, words))}", flush=True)
        if code := main([str(word) for word in words]):
            raise DraftcacheError(f"draftcache report ended with exit code {code}; see its message above")

    def _run_recipe(self) -> None:
        """Run the steps of the shipped recipe that are not done, in this process: starting others would take longer."""
        from draftcache.tools.cli import main
        from draftcache.tools.recipes.checks import check_steps
        from draftcache.tools.recipes.recipe import find_recipe, load_recipe
        from draftcache.tools.recipes.runner import run_steps
        from draftcache.tools.recipes.steps import steps_of

        stages = ("train-stage1", "train-stage2")
        given = {f"{stage}.{name}": value for stage in stages for name, value in DRAFTS[self.draft].items()}
        recipe = load_recipe(find_recipe("demo"), given, self.output)
        outcomes = run_steps(check_steps(steps_of(recipe, self.output)), self.output, lambda _, words: main(words))
        if code := outcomes[-1].exit_code:
            raise DraftcacheError(f"[{outcomes[-1].name}] ended with exit code {code}; see its message above")
        self.seconds |= {one.name: round(one.seconds, 1) for one in outcomes}

    def write_data(self) -> None:
        """Write the conversations and the verifier's answers, one file of JSON lines for each split."""
        self.output.mkdir(parents=True, exist_ok=True)
        self._write_conversations()
        self._write_traces()

    def _write_conversations(self) -> None:
        size = self.size
        for split, count in (("train", size.train_conversations), ("val", size.val_conversations)):
            path = self.path(f"{split}.jsonl")
            rows = read_conversations(ASSETS / "conversations" / f"{split}.jsonl.gz", 0, count)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def _write_traces(self) -> None:
        """Write the verifier's greedy answers to train prompts that stage 1 does not see and to held-out prompts."""
        from transformers import AutoTokenizer

        from draftcache.tools.demo.traces import prompt_of, write_traces

        size = self.size
        sources = {
            "traces": ("conversations/train.jsonl.gz", size.train_conversations, size.trace_prompts),
            "val_traces": ("conversations/val.jsonl.gz", size.val_conversations, size.held_out_prompts),
            "mt_bench": ("prompts/mt_bench.jsonl.gz", 0, size.held_out_prompts),
            "humaneval": ("prompts/humaneval.jsonl.gz", 0, size.held_out_prompts),
        }
        sources = {split: source for split, source in sources.items() if not self.path(f"{split}.jsonl").exists()}
        if not sources:
            return
        tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
        # There is one single-threaded process per core: on models this small a second thread gains nothing.
        with WorkerPool(os.cpu_count() or 1, _start_worker) as pool:
            answer = partial(_answer, max_new_tokens=size.max_new_tokens, eos_token_id=int(tokenizer.eos_token_id))
            for split, (name, first, count) in sources.items():
                rows = read_conversations(ASSETS / name, first, count)
                write_traces(
                    partial(pool.map, answer),
                    tokenizer,
                    [prompt_of(row["messages"]) for row in rows],
                    self.path(f"{split}.jsonl"),
                    max_prompt_tokens=size.max_prompt_tokens,
                )

    def _summary(self) -> dict[str, Any]:
        from transformers import AutoTokenizer

        from draftcache.tools.demo.picture import draw_curves
        from draftcache.tools.demo.report import peak_memory_gib, summarize
        from draftcache.tools.truth import truth_check

        started = time.monotonic()
        tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
        truth = truth_check(
            verifier=load_demo_verifier(),
            verifier_path=VERIFIER,
            vocab_map=self.path("vocab_map.safetensors"),
            checkpoint=self.path("stage2"),
            prompts=self._truth_prompts(tokenizer),
            eos_token_id=int(tokenizer.eos_token_id),
            max_new_tokens=self.size.truth_tokens,
            layers=LAYERS,
            directory=self.path("truth"),
        )
        self.seconds["truth check"] = round(time.monotonic() - started, 1)
        evaluations = {
            stage: {
                split: figures
                for store in ("real", "traces")
                for split, figures in read_json(self.path("eval", f"{stage}-{store}.json"))["splits"].items()
            }
            for stage in ("stage1", "stage2")
        }
        summary = summarize([self.path("stores", name) for name in ("real", "traces")], evaluations, truth)
        summary["in_domain_split"] = IN_DOMAIN
        summary["size"] = asdict(self.size)
        summary["peak_memory_gib"] = peak_memory_gib()
        if find_spec("matplotlib") is None:
            print("curves.png is not drawn, as matplotlib is not installed: pip install 'draftcache[plot]'")
            return summary
        draw_curves(
            {stage: self.path(stage, "metrics.jsonl") for stage in ("stage1", "stage2")},
            summary,
            self.path("curves.png"),
        )
        return summary

    def _truth_prompts(self, tokenizer: Any) -> list[list[int]]:
        from draftcache.tools.demo.traces import encode_prompts, prompt_of

        rows = read_conversations(
            ASSETS / "conversations" / "val.jsonl.gz", self.size.val_conversations, 4 * self.size.truth_prompts
        )
        encoded = encode_prompts(tokenizer, [prompt_of(row["messages"]) for row in rows])
        return [ids for ids in encoded if len(ids) <= self.size.max_prompt_tokens][: self.size.truth_prompts]
