"""The capture job: prepared conversations -> verifier -> gates -> committed shards.

The plan (which conversation goes into which shard) is a pure function of the dataset and `--shard-tokens`, so a
killed job resumes by skipping committed shards, and the finished store is the same as an uninterrupted one's.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from tqdm import tqdm

from capture.config import CaptureConfig
from capture.gates import Gates
from capture.ssm_precision import enforce_contract
from capture.teacher_topk import teacher_signal
from capture.token_dataset import TokenDataset
from capture.verifier import (
    choose_device,
    choose_dtype,
    describe_verifier,
    load_verifier,
)
from store.commits import read_record
from store.errors import GateError, InputError
from store.files import atomic_path
from store.manifest import StoreManifest, Tap
from store.reader import FROZEN_NAME, VOCAB_MAP_NAME, shard_name
from store.rows import rows_in_reach, teacher_positions
from store.schema import Conversation, tap_name
from store.vocab_map import VocabMap
from store.writer import StoreWriter


@dataclass(frozen=True)
class ShardPlan:
    """One shard's conversations: numbers `first .. last` of one split, and how many tokens they have."""

    split: int
    first: int
    last: int
    tokens: int


@dataclass
class CaptureSummary:
    """What one run of the job did, and what the store holds now."""

    shards: int = 0
    tokens: int = 0
    payload_bytes: int = 0
    seconds: float = 0.0
    quarantined: list[dict[str, Any]] = field(default_factory=list)


def plan_shards(dataset: TokenDataset, splits: tuple[str, ...], shard_tokens: int) -> list[ShardPlan]:
    """Fill shards in the dataset's order until each holds at least `shard_tokens`; no shard spans two splits."""
    plan = []
    for split, name in enumerate(splits):
        lengths = np.asarray(dataset.split(name).conversations["tokens"])
        first, tokens = 0, 0
        for number, length in enumerate(lengths):
            tokens += int(length)
            if tokens >= shard_tokens or number + 1 == len(lengths):
                plan.append(ShardPlan(split=split, first=first, last=number + 1, tokens=tokens))
                first, tokens = number + 1, 0
    return plan


class CaptureJob:
    """Loads what the job needs, refuses what does not fit together, then runs the shards that are missing."""

    def __init__(self, config: CaptureConfig) -> None:
        self.config = config
        self.dataset = TokenDataset.open(config.dataset)
        self.splits = config.splits or tuple(self.dataset.splits)
        unknown = [name for name in self.splits if name not in self.dataset.splits]
        if unknown:
            raise InputError(f"{config.dataset}: expected splits among {list(self.dataset.splits)}, found {unknown}")
        self.vocab_map = VocabMap.load(config.vocab_map or config.dataset / VOCAB_MAP_NAME)
        if config.top_k > len(self.vocab_map):
            raise InputError(
                f"--top-k: expected at most the draft vocabulary's {len(self.vocab_map)}, found {config.top_k}"
            )
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.compute_dtype, self.device)
        self.verifier = load_verifier(
            config.verifier, device=self.device, dtype=self.dtype, trust_remote_code=config.trust_remote_code
        )
        self._require_fit()
        self.ssm = enforce_contract(self.verifier.model, config.verifier, allow_fallback=config.allow_fallback)
        self.self_check = self.verifier.self_check(config.layers)
        self.plan = plan_shards(self.dataset, self.splits, config.shard_tokens)
        self.manifest = self._manifest()

    def _require_fit(self) -> None:
        verifier, config = self.verifier, self.config
        if config.layers[-1] >= len(verifier.blocks):
            raise InputError(
                f"--layers: expected blocks 0 to {len(verifier.blocks) - 1} of {config.verifier}, "
                f"found {list(config.layers)}"
            )
        for name, size in (
            ("dataset", self.dataset.vocab_size),
            ("vocabulary map", self.vocab_map.vocab_size),
        ):
            if size > verifier.vocab_size:
                raise InputError(
                    f"{config.dataset}: expected a {name} of at most the verifier's {verifier.vocab_size} token ids, "
                    f"found {size}; it was prepared with another tokenizer"
                )

    def _manifest(self) -> StoreManifest:
        config = self.config
        return StoreManifest(
            verifier=describe_verifier(config.verifier, self.verifier),
            tokenizer_hash=self.dataset.tokenizer_hash,
            chat_template_hash=self.dataset.chat_template_hash,
            dataset_hash=self.dataset.content_hash(self.splits),
            splits=self.splits,
            taps=tuple(Tap(layer=layer) for layer in config.layers),
            tap_dtype=config.tap_dtype,
            compute_dtype=str(self.dtype).removeprefix("torch."),
            window=config.window or None,
            top_k=config.top_k,
            draft_vocab_size=len(self.vocab_map),
            draft_vocab_hash=self.vocab_map.hash,
            shard_tokens=config.shard_tokens,
            shards=len(self.plan),
            ssm=self.ssm,
            provenance=self._provenance(),
        )

    def _provenance(self) -> dict[str, Any]:
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": gpu,
            "attention": str(self.verifier.model.config._attn_implementation),
            "self_check": self.self_check,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def run(self) -> CaptureSummary:
        """Write every shard that is not committed yet, then the store's index."""
        summary = CaptureSummary()
        with StoreWriter(self.config.output, self.manifest, self._write_files) as writer:
            done = writer.committed()
            missing = [shard for shard in range(len(self.plan)) if shard not in done]
            if missing:
                writer.discard_index()
            total = sum(self.plan[shard].tokens for shard in missing)
            started = time.monotonic()
            with tqdm(total=total, unit="tok", unit_scale=True, desc="capture", disable=not missing) as bar:
                for shard in missing:
                    self._run_shard(writer, shard, summary, bar)
            summary.seconds = time.monotonic() - started
            writer.finish()
        return summary

    def _run_shard(self, writer: StoreWriter, shard: int, summary: CaptureSummary, bar: Any) -> None:
        plan = self.plan[shard]
        gates = self._gates_before(shard)
        tokens = self.dataset.split(self.splits[plan.split])
        kept: list[Conversation] = []
        quarantined: list[dict[str, Any]] = []
        tails: list[np.ndarray[Any, Any]] = []
        for number in range(plan.first, plan.last):
            token_ids, loss_mask, content_hash = tokens[number]
            try:
                arrays = self.capture_one(token_ids, loss_mask, gates)
            except GateError as exc:
                quarantined.append(
                    {
                        "split": self.splits[plan.split],
                        "dataset_index": number,
                        "content_hash": content_hash,
                        "reason": str(exc),
                    }
                )
                bar.write(f"quarantined {self.splits[plan.split]}[{number}]: {exc}")
            else:
                tails.append(tail_mass(arrays))
                kept.append(
                    Conversation(content_hash=content_hash, split=plan.split, dataset_index=number, arrays=arrays)
                )
            bar.update(len(token_ids))
            bar.set_postfix_str(f"{summary.payload_bytes / 1e9:.2f} GB, {len(summary.quarantined)} quarantined")
        summary.payload_bytes += writer.write_shard(
            shard,
            kept,
            {
                "tokens": plan.tokens,
                "quarantined": quarantined,
                "gates": gates.to_json(),
                "tail_mass": _describe(np.concatenate(tails) if tails else np.empty(0)),
                "provenance": self._provenance(),
            },
        )
        summary.shards += 1
        summary.tokens += plan.tokens
        summary.quarantined += quarantined

    def _gates_before(self, shard: int) -> Gates:
        """Bands as they stood after the shard before this one, so that a resumed job judges alike."""
        record = read_record(self.config.output, shard_name(shard - 1)) if shard else None
        return Gates.from_json(record["gates"]) if record else Gates()

    def capture_one(
        self, token_ids: np.ndarray[Any, Any], loss_mask: np.ndarray[Any, Any], gates: Gates
    ) -> dict[str, np.ndarray[Any, Any]]:
        """Arrays of `store.schema` for one conversation. Raises GateError."""
        config = self.config
        positions = rows_in_reach(loss_mask, config.window or None)
        teacher = teacher_positions(loss_mask)
        if teacher.size == 0:
            raise GateError("expected an assistant turn of at least two tokens after the first token, found none")
        ids = torch.from_numpy(token_ids.astype(np.int64)).to(self.device)
        states = self.verifier.forward(ids, config.layers)
        rows = torch.from_numpy(positions).to(self.device)
        places = torch.from_numpy(teacher).to(self.device)
        taps = {layer: states.taps[layer][rows] for layer in config.layers}
        final = states.final[places]
        gates.check(taps, final)
        signal = teacher_signal(
            final,
            ids[places + 1],
            self.verifier.head,
            torch.from_numpy(self.vocab_map.target_ids).to(self.device),
            top_k=config.top_k,
            head_slice=config.head_slice,
        )
        return {
            "token_ids": token_ids.astype(np.uint32),
            "loss_mask": loss_mask.astype(np.uint8),
            "positions": positions.astype(np.int32),
            "teacher_positions": teacher.astype(np.int32),
            **{tap_name(layer): self._stored(tap) for layer, tap in taps.items()},
            **{name: value.cpu().numpy() for name, value in signal.items()},
        }

    def _stored(self, tap: torch.Tensor) -> np.ndarray[Any, Any]:
        if self.config.tap_dtype == "float32":
            return np.asarray(tap.float().cpu().numpy())
        return np.asarray(tap.to(torch.bfloat16).view(torch.uint16).cpu().numpy())

    def _write_files(self, root: Path) -> list[Path]:
        """Frozen weights that a trainer needs, so that it never loads the verifier; and the vocabulary map."""
        verifier = self.verifier
        target_ids = torch.from_numpy(self.vocab_map.target_ids).to(self.device)
        norm = verifier.final_norm.weight
        assert isinstance(norm, torch.Tensor)
        tensors = {
            "embed_tokens": verifier.embeddings.weight,
            "norm": norm,
            "lm_head": verifier.head.weight[target_ids],
        }
        with atomic_path(root / FROZEN_NAME) as partial:
            save_file({name: value.detach().contiguous().cpu() for name, value in tensors.items()}, partial)
        self.vocab_map.save(root / VOCAB_MAP_NAME)
        return [root / FROZEN_NAME, root / VOCAB_MAP_NAME]


def tail_mass(arrays: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """tau [P] float32: draft-vocabulary probability that the stored top-k leaves out."""
    logits = arrays["teacher_max"][:, None] - arrays["teacher_gaps"].astype(np.float32)
    kept = np.exp(logits - arrays["log_z_draft"][:, None]).sum(axis=1)
    return np.asarray(np.clip(1.0 - kept, 0.0, None))


def _describe(values: np.ndarray[Any, Any]) -> dict[str, float | int]:
    """Count, mean, median and 99th percentile."""
    if values.size == 0:
        return {"count": 0}
    p50, p99 = np.quantile(values, [0.5, 0.99])
    return {"count": int(values.size), "mean": float(values.mean()), "p50": float(p50), "p99": float(p99)}
