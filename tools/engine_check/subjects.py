"""What is checked: a verifier, prompts for it, and drafts. The check makes them itself, or they are a user's own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import atomic_directory, read_json

DRAFTS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle31": {"eagle31": True},
    "dflash": {"draft": "dflash"},
    "dspark": {"draft": "dspark", "markov_rank": 64},
    "dspark-bonus": {"draft": "dspark", "markov_rank": 64, "anchor": "bonus"},
    "dflash-full": {"draft": "dflash", "sliding_window": 0},
}
"""The drafts that can be trained here, and what their training sets that the others' does not."""
ON_GPU_ONLY = ("dspark", "dspark-bonus")
"""Drafts that vLLM serves on a GPU alone."""
OWN = "own"
"""The name of a user's own draft."""
IF_NAMED = ("dspark-bonus", "dflash-full")
"""Drafts that are checked only where they are asked for: the anchor's slot of the first predicts nothing, as in
speculators, and the layers of the second attend to everything before."""
LLAMA_VOCABULARY = 4096
_LLAMA_USED = 3072  # ids of the prompts; the rest leaves room for a mask token
_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A verifier with prompts, and how drafts for it are trained."""

    name: str
    verifier: Path
    prompts: Sequence[Sequence[int]]
    layers: tuple[int, ...]
    training: Mapping[str, Any]
    """Settings of `TrainConfig` that all of its drafts share."""
    draft_vocab_size: int | None = None
    """Size of the draft vocabulary that is counted from the answers; None where `vocab_map` is given."""
    vocab_map: Path | None = None
    checkpoint: Path | None = None
    """The user's draft, which is then the only one."""
    on_device: bool = False
    """Whether capture runs where training does. Small verifiers are captured on the CPU, where float32 is exact."""

    one_thread: bool = False
    """Whether it is so small that a second thread on a CPU gains nothing. Where other programs run too, threads that
    wait for one another took 80 times as long."""

    @property
    def window(self) -> int:
        """The drafts' attention window in positions; 0 for full attention."""
        return int(self.training.get("sliding_window", 0))

    @property
    def beyond_window(self) -> int:
        """Number of prompts that are longer than the drafts' window."""
        return sum(len(prompt) > self.window for prompt in self.prompts) if self.window else 0

    def settings_of(self, draft: str, draft_tokens: int) -> dict[str, Any]:
        """Return what `TrainConfig` is built from for one of `DRAFTS`, beside store and output."""
        settings = DRAFTS[draft]
        own: dict[str, Any] = {"ttt_steps": draft_tokens}
        if "draft" in settings:
            anchor_is_given = settings["draft"] == "dflash" or settings.get("anchor") == "bonus"
            own = {"num_hidden_layers": 2, "block_size": draft_tokens + anchor_is_given}
        return {**self.training, **own, **settings}


def llama_subject(directory: Path, prompts: int, steps: int = 400) -> Subject:
    """Return a small Llama with random weights, made in `directory` where it is not there yet, and random prompts.

    Most prompts are longer than the drafts' window of 24.
    """
    if not directory.exists():
        with atomic_directory(directory) as partial:
            save_llama(partial)
    draw = random.Random(0)
    drawn = [[draw.randrange(3, _LLAMA_USED) for _ in range(draw.randrange(10, 60))] for _ in range(prompts)]
    return Subject(
        name="llama",
        verifier=directory,
        prompts=drawn,
        layers=(1, 2, 4),
        draft_vocab_size=600,
        one_thread=True,
        training={
            "epochs": -(-steps * _BATCH // prompts), "batch_conversations": _BATCH, "learning_rate": 3e-3,
            "sliding_window": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "checkpoint_every": 10_000,
        },
    )  # fmt: skip


def llama_config() -> Any:
    """Return the configuration of the small Llama, in widths that vLLM takes."""
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=6, vocab_size=LLAMA_VOCABULARY, hidden_size=128, intermediate_size=256,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
        initializer_range=0.06, bos_token_id=0, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip


def save_llama(directory: Path, seed: int = 0) -> None:
    """Save the small Llama with the demo's tokenizer. Its weights are exact in bfloat16.

    Its embeddings are large beside what its blocks add, so that a text's next token mostly depends on its last few. A
    draft can learn that; of small random weights it learns nothing.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM, set_seed

    from draftcache.tools.demo.pipeline import VERIFIER

    set_seed(seed)
    model = LlamaForCausalLM(llama_config())
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.32)
    torch.nn.init.normal_(model.lm_head.weight, std=0.08)
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(VERIFIER).save_pretrained(directory)


def demo_subject(prompts: int, steps: int = 250) -> Subject:
    """Return the demo's NemotronH with MoE, and its held-out conversations up to their last user turn.

    One prompt in three is longer than the drafts' window of 256.
    """
    from transformers import AutoTokenizer

    from draftcache.tools.demo.pipeline import ASSETS, LAYERS, VERIFIER, read_conversations
    from draftcache.tools.demo.traces import encode_prompts

    rows = read_conversations(ASSETS / "conversations" / "val.jsonl.gz", 0, prompts)
    if len(rows) < prompts:
        raise InputError(f"--prompts: expected at most {len(rows)}, the demo's held-out conversations, found {prompts}")
    encoded = encode_prompts(AutoTokenizer.from_pretrained(VERIFIER), [_to_last_user_turn(row) for row in rows])
    return Subject(
        name="nemotron_h-moe",
        verifier=VERIFIER,
        prompts=encoded,
        layers=LAYERS,
        draft_vocab_size=1024,
        training={
            "epochs": -(-steps * _BATCH // prompts), "batch_conversations": _BATCH, "learning_rate": 2e-3,
            "beta2": 0.99, "sliding_window": 256, "intermediate_size": 512, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "checkpoint_every": 10_000,
        },
    )  # fmt: skip


def _to_last_user_turn(row: dict[str, Any]) -> list[dict[str, Any]]:
    messages = row["messages"]
    last = max(number for number, message in enumerate(messages) if message["role"] == "user")
    return list(messages[: last + 1])


def own_subject(verifier: Path, run: Path, store: str, prompts: int, room: int) -> Subject:
    """Return a user's verifier and draft, with prompts of every length of the store that the draft fits.

    They leave `room` positions of the verifier's for the answer.

    Raises what `truth.require_online` raises: ManifestMismatchError where the verifier is not the store's,
    CheckpointError where the draft does not fit, and InputError where the store has no prompts.
    """
    from draftcache.draft_train.checkpoint import resolve_checkpoint
    from draftcache.store.reader import StoreReader
    from draftcache.tools.truth import opening_prompts, require_online

    reader = StoreReader(store)
    state = require_online(reader, verifier, run)
    vocab = reader.manifest.teacher_form.choose(state.shape.draft_vocab_size)
    found = opening_prompts(reader, list(reader.manifest.splits), prompts, shortest=False)
    if (positions := positions_of(verifier)) is not None:
        found = [prompt for prompt in found if len(prompt) + room <= positions]
    return Subject(
        name=verifier.name,
        verifier=verifier,
        prompts=found,
        layers=reader.manifest.layers,
        training={"sliding_window": state.shape.sliding_window or 0},
        vocab_map=reader.files.more_vocab_maps.get(vocab.size, reader.files.vocab_map),
        checkpoint=resolve_checkpoint(run),
        on_device=True,
    )


def positions_of(verifier: Path) -> int | None:
    """Return the positions that a verifier's configuration allows; None where it names none."""
    found = read_json(verifier / "config.json").get("max_position_embeddings")
    return int(found) if found else None
