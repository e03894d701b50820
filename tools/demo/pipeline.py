"""`draftcache demo`: the whole product on a tiny trained verifier and real text, on two CPU cores.

Real conversations -> prepare -> capture -> stage 1; the verifier's own greedy traces -> prepare -> capture ->
stage 2 from stage 1's checkpoint under the same vocabulary map; acceptance before and after; export; truth check.
Every stage is the command that a user would type. It is printed before it runs, and finished stages are skipped when
the demo runs again. The demo uses the CPU even if there is a GPU, so that every machine makes the same run.
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


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """The settings of one demo run: how much of the shipped text it uses, and how it trains."""

    train_conversations: int = 1000
    val_conversations: int = 60
    trace_prompts: int = 800
    held_out_prompts: int = 72
    max_prompt_tokens: int = 320
    max_new_tokens: int = 128
    max_length: int = 1024
    draft_vocab_size: int = 3072
    stage1_epochs: int = 2
    stage2_epochs: int = 2
    batch_conversations: int = 2
    stage1_ttt_steps: int = 3
    """Stage 1 only has to learn the language, so a short unroll is enough, at half the cost."""
    stage2_ttt_steps: int = 5
    """The number of draft tokens that are proposed and evaluated."""
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

    def __init__(self, output: Path, size: DemoSize) -> None:
        self.output = output
        self.size = size
        self.seconds: dict[str, float] = {}
        self.memory: dict[str, float] = {}

    def path(self, *parts: str) -> Path:
        """Return a path below the run's directory."""
        return self.output.joinpath(*parts)

    def command(self, *arguments: object) -> None:
        """Print and run one `draftcache` command. Raises DraftcacheError if it fails."""
        from draftcache.tools.cli import main

        words = [str(argument) for argument in arguments]
        print(f"\n$ draftcache {' '.join(words)}", flush=True)
        started = time.monotonic()
        code = main(words)
        self.seconds[f"{len(self.seconds):02d} {words[0]}"] = round(time.monotonic() - started, 1)
        if code != 0:
            raise DraftcacheError(f"draftcache {words[0]} ended with exit code {code}; see its message above")

    def run(self) -> dict[str, Any]:
        """Run every stage; return the summary (`report.summarize`, sizes, seconds), as written to summary.json."""
        started = time.monotonic()
        self.output.mkdir(parents=True, exist_ok=True)
        self._write_conversations()
        self._write_traces()
        self._prepare()
        self._capture("real", "train,val")
        self._capture("traces", ",".join(("traces", *TRACE_SPLITS)))
        self._train(
            "stage1", "real", "train", self.size.stage1_epochs, 3e-3, "--ttt-steps", self.size.stage1_ttt_steps,
            eval_split="val",
        )  # fmt: skip
        self._evaluate("stage1")
        self._train(
            "stage2", "traces", "traces", self.size.stage2_epochs, 2e-3, "--init-from", self.path("stage1"),
            "--weight-decay", 0.3, "--ttt-steps", self.size.stage2_ttt_steps,
            eval_split=IN_DOMAIN,
        )  # fmt: skip
        self._evaluate("stage2")
        self._export()
        summary = self._summary()
        summary["seconds"] = {**self.seconds, "total": round(time.monotonic() - started, 1)}
        write_json(self.path("summary.json"), summary)
        return summary

    def _write_conversations(self) -> None:
        size = self.size
        for split, count in (("train", size.train_conversations), ("val", size.val_conversations)):
            path = self.path("data", f"{split}.jsonl")
            path.parent.mkdir(exist_ok=True)
            rows = read_conversations(ASSETS / "conversations" / f"{split}.jsonl.gz", 0, count)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def _write_traces(self) -> None:
        """Write the verifier's greedy answers to train prompts that stage 1 does not see and to held-out prompts."""
        from transformers import AutoTokenizer

        from draftcache.tools.demo.report import peak_memory_gib
        from draftcache.tools.demo.traces import prompt_of, write_traces

        size = self.size
        sources = {
            "traces": ("conversations/train.jsonl.gz", size.train_conversations, size.trace_prompts),
            "val_traces": ("conversations/val.jsonl.gz", size.val_conversations, size.held_out_prompts),
            "mt_bench": ("prompts/mt_bench.jsonl.gz", 0, size.held_out_prompts),
            "humaneval": ("prompts/humaneval.jsonl.gz", 0, size.held_out_prompts),
        }
        sources = {
            split: source for split, source in sources.items() if not self.path("data", f"{split}.jsonl").exists()
        }
        if not sources:
            return
        started = time.monotonic()
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
                    self.path("data", f"{split}.jsonl"),
                    max_prompt_tokens=size.max_prompt_tokens,
                )
            self.memory["each verifier process"] = pool.submit(peak_memory_gib).result()
        self.seconds["traces"] = round(time.monotonic() - started, 1)

    def _prepare(self) -> None:
        data = self.path("data")
        common = ("--tokenizer", VERIFIER, "--max-length", self.size.max_length)
        self.command(
            "prepare", f"train={data / 'train.jsonl'}", "--held-out", f"val={data / 'val.jsonl'}", *common,
            "--output", self.path("prepared", "real"),
        )  # fmt: skip
        held_out = [part for name in TRACE_SPLITS for part in ("--held-out", f"{name}={data / name}.jsonl")]
        self.command(
            "prepare", f"traces={data / 'traces.jsonl'}", *held_out, *common,
            "--output", self.path("prepared", "traces"),
        )  # fmt: skip
        if not self.path("vocab_map.safetensors").exists():
            prepared = (f"{self.path('prepared', 'real')}:train", f"{self.path('prepared', 'traces')}:traces")
            self.command(
                "vocab", "--size", self.size.draft_vocab_size, "--output", self.path("vocab_map.safetensors"), *prepared
            )

    def _capture(self, name: str, splits: str) -> None:
        self.command(
            "capture", "--verifier", VERIFIER, "--dataset", self.path("prepared", name), "--splits", splits,
            "--vocab-map", self.path("vocab_map.safetensors"), "--layers", ",".join(map(str, LAYERS)),
            "--window", 512, "--device", "cpu", "--output", self.path("stores", name),
        )  # fmt: skip

    def _train(
        self, stage: str, store: str, split: str, epochs: int, rate: float, *extra: object, eval_split: str
    ) -> None:
        self.command(
            "train", "--store", self.path("stores", store), "--splits", split, "--output", self.path(stage),
            "--learning-rate", rate, "--epochs", epochs,
            "--batch-conversations", self.size.batch_conversations, "--sliding-window", 512,
            "--intermediate-size", 512, "--num-attention-heads", 4, "--num-key-value-heads", 2, "--head-dim", 64,
            "--eval-split", eval_split, "--beta2", 0.99,
            "--eval-every", 300, "--eval-conversations", 16,
            "--checkpoint-every", 200, "--device", "cpu", *extra,
        )  # fmt: skip

    def _evaluate(self, stage: str) -> None:
        for store, splits in (("real", "val"), ("traces", ",".join(TRACE_SPLITS))):
            self.command(
                "eval", "--store", self.path("stores", store), "--checkpoint", self.path(stage), "--splits", splits,
                "--bigram-store", self.path("stores", "traces" if store == "traces" else "real"),
                "--bigram-splits", "traces" if store == "traces" else "train",
                "--device", "cpu", "--output", self.path("eval", f"{stage}-{store}.json"),
            )  # fmt: skip

    def _export(self) -> None:
        if not self.path("draft").exists():
            self.command(
                "export", "--checkpoint", self.path("stage2"), "--engine", "vllm", "--output", self.path("draft")
            )

    def _summary(self) -> dict[str, Any]:
        from transformers import AutoTokenizer

        from draftcache.tools.demo.picture import draw_curves
        from draftcache.tools.demo.report import peak_memory_gib, summarize
        from draftcache.tools.demo.truth import truth_check

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
        summary["peak_memory_gib"] = {**self.memory, "main process": peak_memory_gib()}
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
