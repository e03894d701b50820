"""The capture job of one worker: prepared conversations -> verifier -> gates -> committed shards.

Any number of workers may run on one store, on any number of machines. They share nothing but the store: a worker takes
a shard by its lock (where the storage has locks) and publishes it by its commit record, of which the first one counts.
Another worker takes over the shard of a killed one, and the finished store does not depend on which worker captured
which shard.
"""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from transformers import PretrainedConfig

from draftcache.capture.job.calibration import calibrate
from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.progress import CaptureSummary, JobProgress, Line
from draftcache.capture.job.shard_capture import ShardCapture
from draftcache.capture.job.shard_worker import POLL_S, ShardWorker, WorkerRole
from draftcache.capture.job.space_check import bytes_left, require_space
from draftcache.capture.job.start_check import check_config, check_verifier, with_layers
from draftcache.capture.job.tensor_parallel import TensorParallelGroup
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.capture.prepare.draft_vocabulary import load_vocab_maps
from draftcache.capture.verifier.load import Verifier, choose_dtype, load_verifier
from draftcache.capture.verifier.source import StateSource
from draftcache.capture.verifier.ssm_precision import enforce_contract
from draftcache.capture.verifier.weights import former_fingerprint
from draftcache.store.common.device import use_device
from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.store.common.stopping import StopRequest
from draftcache.store.common.tensor_files import save_tensors
from draftcache.store.format.frozen import EMBED_TOKENS, FROZEN_NAME, NORM
from draftcache.store.format.manifest import StoreManifest, Tap
from draftcache.store.format.vocab_map import VOCAB_MAP_NAME
from draftcache.store.output_check import require_own_or_empty
from draftcache.store.storage.base import open_storage
from draftcache.store.writer import StoreWriter


class CaptureJob:
    """Loads dataset, vocabulary maps and verifier, checks that they fit, then runs shards until none is missing.

    Use as a context manager, or call `close` at the end.
    """

    verifier: StateSource
    ssm: dict[str, Any] | None
    self_check: dict[str, float]
    _start = ""
    """How long the start took, in words; empty where no verifier was loaded."""

    def __init__(self, config: CaptureConfig, model: PretrainedConfig | None = None) -> None:
        """`model` is the configuration of the verifier's text model where it is known already."""
        self.config = config = with_layers(config, model)
        self.work = WorkPlan.of(config)
        self.vocab_maps = load_vocab_maps(config.vocab_map or config.dataset / VOCAB_MAP_NAME, config.more_vocab_maps)
        if config.teacher == "draft" and config.top_k > (most := len(self.vocab_maps[0])):
            raise InputError(f"--top-k: expected at most the draft vocabulary's {most}, found {config.top_k}")
        model = check_config(config, self.work, model)
        self.device = use_device(config.device)
        self.dtype = choose_dtype(config.compute_dtype, self.device)
        self.storage = open_storage(config.output)
        require_own_or_empty(self.storage)
        self._require_space(model)
        self._followers = TensorParallelGroup(config) if config.tensor_parallel > 1 else None
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def _require_space(self, model: PretrainedConfig) -> None:
        hidden_size, root = getattr(model, "hidden_size", None), self.storage.local_root
        if root is None or hidden_size is None or self.config.ignore_free_space:
            return
        needed = bytes_left(
            self.config,
            self.work,
            self.storage,
            hidden_size=hidden_size,
            vocab_size=getattr(model, "vocab_size", self.work.dataset.vocab_size),
            draft_vocab_sizes=[len(item) for item in self.vocab_maps],
            dtype=self.dtype,
        )
        require_space(root, needed)

    def _load(self) -> None:
        if self._followers is None:
            self.verifier = self._load_and_check()
            return
        with self._followers.all_alive():
            self._followers.join()
            verifier = self._load_and_check()
        self.verifier = self._followers.lead(verifier)

    def _load_and_check(self) -> Verifier:
        config, began = self.config, time.monotonic()
        verifier = load_verifier(
            config.verifier,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=config.trust_remote_code,
            tensor_parallel=config.tensor_parallel,
            max_model_len=config.max_model_len,
        )
        loaded = time.monotonic()
        self._require_fit(verifier)
        self.ssm = enforce_contract(verifier.model, config.verifier, allow_fallback=config.allow_fallback)
        verifier, self.self_check = check_verifier(verifier, config, self.work)
        self._start = f"{loaded - began:.1f} s to load the verifier, {time.monotonic() - loaded:.1f} s to check it"
        return verifier

    def close(self) -> None:
        """End the other processes that hold parts of the verifier with `--tensor-parallel`."""
        if self._followers is not None:
            self._followers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _require_fit(self, verifier: StateSource) -> None:
        config = self.config
        if config.prefill_chunk % (multiple := verifier.chunk_multiple):
            raise InputError(
                f"--prefill-chunk: expected a multiple of the scan's chunk of {multiple} tokens, so that "
                f"none is padded where a piece ends, found {config.prefill_chunk}"
            )
        for name, size in (
            ("dataset", self.work.dataset.vocab_size),
            ("vocabulary map", self.vocab_maps[0].vocab_size),
        ):
            if size > verifier.vocab_size:
                raise InputError(
                    f"{config.dataset}: expected a {name} of at most the verifier's {verifier.vocab_size} token ids, "
                    f"found {size}; it was prepared with another tokenizer"
                )
        if config.teacher == "full" and config.top_k > verifier.vocab_size:
            raise InputError(
                f"--top-k: expected at most the verifier's {verifier.vocab_size} token ids, found {config.top_k}"
            )
        if config.teacher == "hidden" and verifier.head.bias is not None:
            raise InputError(
                f"--teacher hidden: expected a head without bias in {config.verifier}, found one; its logits can't be "
                "recomputed from the states and the head's rows alone: use --teacher full"
            )

    def settings(self) -> StoreManifest:
        """The store's manifest without the fields that the calibration measures."""
        config, work = self.config, self.work
        return StoreManifest(
            verifier=self.verifier.describe(config.verifier, full_hash=config.full_hash),
            tokenizer_hash=work.dataset.tokenizer_hash,
            chat_template_hash=work.dataset.chat_template_hash,
            dataset_hash=work.dataset.content_hash(work.splits),
            splits=work.splits,
            taps=tuple(Tap(layer=layer) for layer in config.layers),
            mode=config.mode,
            layout=config.layout,
            compute_dtype=str(self.dtype).removeprefix("torch."),
            window=config.window or None,
            teacher=config.teacher,
            top_k=0 if config.teacher == "hidden" else config.top_k,
            draft_vocab_size=len(self.vocab_maps[0]),
            draft_vocab_hash=self.vocab_maps[0].hash,
            more_draft_vocabs={str(len(item)): item.hash for item in self.vocab_maps[1:]},
            shard_tokens=config.shard_tokens,
            shards=len(work.shards),
            ssm=self.ssm and self.ssm | {"forward": self.verifier.name, "prefill_chunk": config.prefill_chunk},
            provenance=self._provenance(),
        )

    def _provenance(self) -> dict[str, Any]:
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": gpu,
            "tensor_parallel": self.config.tensor_parallel,
            **({} if self.config.max_model_len is None else {"max_model_len": self.config.max_model_len}),
            "forward": {"name": self.verifier.name, **self.verifier.implementations()},
            "self_check": self.self_check,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def run(self, stop: StopRequest | None = None) -> CaptureSummary:
        """Capture all missing shards, alone or beside other workers; returns when the store is whole."""
        stop = stop or StopRequest(self.config.grace_seconds)
        with JobProgress(self.work, self.storage) as progress:
            self.run_worker(WorkerRole(report=lambda event: progress.take(0, event), stop=stop))
        return progress.summary()

    def run_worker(self, role: WorkerRole) -> None:
        """Run as one of a command's workers; returns when no shard is missing and the index is written.

        Raises Stopped when `role.stop` is asked for: committed shards stay, unfinished ones are removed.
        """
        if role.number == 0:
            role.report(Line(self._what_runs()))
            if self._start:
                role.report(Line(f"start: {self._start}"))
        manifest = self.agree_on_manifest(role)
        shards = ShardCapture(self.config, self.work, self.verifier, self.vocab_maps, manifest)
        with StoreWriter(self.config.output, manifest, partial(self._write_files, manifest)) as writer:
            ShardWorker(self.work, shards, writer, role, self._provenance).run()

    def _what_runs(self) -> str:
        details = dict(self.verifier.implementations())
        reason = details.pop("reason", "")
        if self.ssm is not None:
            details["scan"] = self.ssm["scan"]
        listed = ", ".join(f"{name} {value}" for name, value in details.items())
        return (
            f"forward: {self.verifier.name}"
            + (f", the model's own code, for {reason}" if reason else "")
            + f" ({listed})"
        )

    def agree_on_manifest(self, role: WorkerRole) -> StoreManifest:
        """The settings with the store's calibration, which the first job measures and all others read.

        Raises ManifestMismatchError, with the fields' names, where the store was made with other settings.
        """
        settings = self.settings()
        while not StoreManifest.exists(self.storage):
            calibrating = self.storage.lock("calibrate")
            if calibrating is None:
                role.stop.wait(POLL_S)
                continue
            try:
                if not StoreManifest.exists(self.storage):
                    self._begin_store(settings, role)
            finally:
                calibrating.release()
        stored = StoreManifest.load(self.storage)
        settings = self._with_fingerprint_of(stored, settings)
        self._require_same_engine(stored, settings)
        stored.require_same(settings, self.storage.describe(), calibrated=False)
        return settings.with_calibration_of(stored)

    def _require_same_engine(self, stored: StoreManifest, settings: StoreManifest) -> None:
        """Raise ManifestMismatchError where one of them has its states from an engine, and the other from another."""
        theirs, ours = (item.provenance.get("engine", {}).get("name") for item in (stored, settings))
        if theirs != ours:
            raise ManifestMismatchError(
                f"{self.storage.describe()}: expected states from {theirs or 'the verifier loaded here'}, as the store "
                f"has them, found {ours or 'the verifier loaded here'} in this job: give the same --engine to resume "
                "it, or another --output for a new store"
            )

    def _with_fingerprint_of(self, stored: StoreManifest, settings: StoreManifest) -> StoreManifest:
        """The settings, with the store's own fingerprint of the weights where a former version took it of the same."""
        named = stored.verifier["weights_hash"]
        if named == settings.verifier["weights_hash"] or named != former_fingerprint(self.config.verifier):
            return settings
        return replace(settings, verifier=settings.verifier | {"weights_hash": named})

    def _begin_store(self, settings: StoreManifest, role: WorkerRole) -> None:
        role.report(Line("calibrating: one pass over some conversations, for the norms that the gates expect"))
        began = time.monotonic()
        measured = calibrate(self.config, self.work, self.verifier)
        role.report(Line(f"calibrated in {time.monotonic() - began:.1f} s"))
        manifest = replace(settings, norm_bands=measured.norm_bands, channel_scales=measured.channel_scales)
        # In an object store two jobs may come this far. Only one manifest is created, with the bands of one job.
        prepare_files = partial(self._write_files, manifest)
        with suppress(ManifestMismatchError), StoreWriter(self.config.output, manifest, prepare_files):
            pass

    def _write_files(self, manifest: StoreManifest, root: Path) -> list[Path]:
        """Write the frozen weights that training needs instead of the verifier, and the vocabulary maps."""
        verifier = self.verifier
        weight = verifier.norm.weight
        rounded = weight.to(self.dtype)  # 1 + w of a bfloat16 w needs more digits
        norm = rounded if torch.equal(rounded.float(), weight) else weight
        tensors = {EMBED_TOKENS: verifier.embeddings.weight, NORM: norm}
        paths = [root / FROZEN_NAME]
        for vocab, item in zip(manifest.teacher_form.vocabularies, self.vocab_maps, strict=True):
            tensors[vocab.head] = verifier.head.weight[torch.from_numpy(item.target_ids).to(self.device)]
            paths.append(root / vocab.map_name)
            item.save(paths[-1])
        save_tensors(paths[0], {name: value.detach().contiguous().cpu() for name, value in tensors.items()})
        return paths
