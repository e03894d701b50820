"""The settings of one training run. This module imports no torch, so that the command line starts fast."""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from draftcache.draft_train.setting_tables import CHOICES, foreign_setting, own_values
from draftcache.store.common.errors import InputError
from draftcache.store.common.settings import require_finite
from draftcache.store.storage.base import Location


def _doc(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All settings of a training run. Each field is a flag of `draftcache train`.

    A run is resumed only under the settings that `objective` returns. Raises InputError for a value out of range.
    """

    store: Location = field(metadata=_doc("store to train from: the --output of `draftcache capture`"))
    output: Path = field(metadata=_doc("directory for checkpoints and metrics; the same command resumes it"))
    splits: tuple[str, ...] = field(metadata=_doc("splits of the store to train on"))
    draft: str = field(default="eagle3", metadata=_doc("architecture of the draft: eagle3, dflash or dspark"))
    init_from: Path | None = field(
        default=None, metadata=_doc("start from this checkpoint's weights with a fresh optimizer (stage 2)")
    )
    remap_vocab: bool = field(
        default=False,
        metadata=_doc("with --init-from: it may have another draft vocabulary; head rows are moved by token id"),
    )
    eval_split: str | None = field(
        default=None, metadata=_doc("split whose acceptance length is measured at the end, and while training")
    )
    eval_every: int = field(
        default=0, metadata=_doc("steps between evaluations on --eval-split; 0 for one at the end only")
    )
    eval_conversations: int = field(default=64, metadata=_doc("conversations of the split to evaluate on"))
    epochs: int = field(default=1, metadata=_doc("passes over the splits"))
    batch_conversations: int = field(default=1, metadata=_doc("conversations per optimizer step, over all ranks"))
    order: str = field(
        default="shuffle",
        metadata=_doc("shuffle conversations, or bucketed: each step has conversations of like length"),
    )
    order_seed: int | None = field(
        default=None, metadata=_doc("seed of the order of conversations; without it --seed's, which also draws weights")
    )
    data_share: float = field(
        default=1.0,
        metadata=_doc(
            "share of the splits' conversations to train on, chosen by content: a smaller one is a part of it"
        ),
    )
    pack_tokens: int = field(
        default=8192,
        metadata=_doc("a rank's conversations of a step go through in packs of up to so many tokens; 0: one by one"),
    )
    prefetch_gb: float = field(default=4.0, metadata=_doc("host memory per rank for reading ahead of the training"))
    learning_rate: float = field(default=1e-4, metadata=_doc("peak AdamW learning rate"))
    warmup_ratio: float = field(default=0.02, metadata=_doc("share of the steps that warm up linearly"))
    final_lr_ratio: float = field(default=0.0, metadata=_doc("learning rate at the end of the cosine, over the peak"))
    weight_decay: float = field(default=0.0, metadata=_doc("AdamW weight decay of the matrices"))
    beta1: float = field(default=0.9, metadata=_doc("AdamW decay of the first moment"))
    beta2: float = field(default=0.95, metadata=_doc("AdamW decay of the second moment"))
    max_grad_norm: float = field(default=0.5, metadata=_doc("gradient norm above which gradients are scaled down"))
    ttt_steps: int = field(
        default=0, metadata=_doc("eagle3: training-time-test steps, how far the draft is unrolled; 0 for 6")
    )
    step_decay: float = field(
        default=0.0,
        metadata=_doc(
            "weight of step or slot k in the loss is step_decay ** k; 0 for the draft's own: 0.8, or exp(-1/gamma) "
            "with the gamma that its paper has for the block size"
        ),
    )
    step_weights: str = field(
        default="decay",
        metadata=_doc("decay; or d-pace: a step weighs as much as acceptance depends on it (see draft_train/loss)"),
    )
    loss: str = field(
        default="",
        metadata=_doc(
            "loss of a row: tail-kl, renormalized-kl, tv, lk, lk-alpha, ce or ce-l1 (see "
            "draft_train/loss/row_losses.py); empty for the draft's own: ce-l1 of dspark, tail-kl of the others"
        ),
    )
    loss_rows: str = field(
        default="turns",
        metadata=_doc("which rows carry loss at which steps: turns, or unshifted (see draft_train/data/loss_rows.py)"),
    )
    out_of_vocab: str = field(
        default="weight",
        metadata=_doc("rows whose verifier argmax is outside the draft vocabulary: weight (by p(D)), drop, or keep"),
    )
    draft_vocab_size: int = field(
        default=0, metadata=_doc("which of the store's draft vocabularies, by its size; 0 for the main one")
    )
    top_k: int = field(
        default=0, metadata=_doc("teacher entries used per position, the best of the store's; 0 for all of them")
    )
    block_size: int = field(default=0, metadata=_doc("dflash, dspark: slots of a block; 0 for 8"))
    anchor: str = field(
        default="",
        metadata=_doc(
            "dspark: first, where the slot of the anchor predicts too, or bonus, where only the others do, as in "
            "dflash; empty for first"
        ),
    )
    anchor_share: float = field(
        default=1.0,
        metadata=_doc("dflash, dspark: share of a conversation's anchors that an epoch trains on, drawn for each"),
    )
    mask_token_id: int = field(
        default=-1,
        metadata=_doc(
            "dflash, dspark: token whose embedding stands in slots that are to be predicted; it must not occur in the "
            "data; -1 chooses one"
        ),
    )
    num_hidden_layers: int = field(default=0, metadata=_doc("dflash, dspark: layers of the draft; 0 for 5"))
    layer_types: tuple[str, ...] = field(
        default=(),
        metadata=_doc("dflash, dspark: sliding or full for each layer; default: what --sliding-window says, for all"),
    )
    block_attention: str = field(
        default="",
        metadata=_doc(
            "dflash, dspark: causal, bidirectional or by-layer: causal in sliding layers, bidirectional in full ones; "
            "empty for by-layer"
        ),
    )
    attention_sinks: bool = field(
        default=False, metadata=_doc("dflash, dspark: each head has a learned logit that attention may go to instead")
    )
    markov_rank: int = field(
        default=0, metadata=_doc("dspark: rank of the logits' bias by the token before; 0 for 256")
    )
    confidence_head: bool = field(
        default=False, metadata=_doc("dspark: train a head that tells how likely each proposal is accepted")
    )
    train_embeddings: bool = field(
        default=False, metadata=_doc("dflash, dspark: train embeddings of the draft's own, not the verifier's")
    )
    train_head: bool = field(
        default=False, metadata=_doc("dflash, dspark: train the head too, from the verifier's rows on")
    )
    sliding_window: int = field(default=4096, metadata=_doc("draft attention window; 0 for full attention"))
    intermediate_size: int = field(default=0, metadata=_doc("width of the draft's MLP; 0 for 3 x hidden"))
    num_attention_heads: int = field(default=32, metadata=_doc("query heads of the draft"))
    num_key_value_heads: int = field(default=2, metadata=_doc("key-value heads of the draft"))
    head_dim: int = field(default=128, metadata=_doc("width of one head"))
    rope_theta: float = field(default=10_000.0, metadata=_doc("rotary base"))
    eagle31: bool = field(
        default=False,
        metadata=_doc("eagle3: norms of its own for each tap, and the normed output is carried: Eagle3.1"),
    )
    head_init: str = field(
        default="verifier",
        metadata=_doc("lm_head and norm start as the verifier's rows (verifier) or at random (random)"),
    )
    loss_chunk: int = field(default=8192, metadata=_doc("rows per slice of the draft's head and loss"))
    compute: str = field(
        default="auto",
        metadata=_doc("fused: by hand, for GPUs; plain: autograd; auto: fused where it can run"),
    )
    attention: str = field(
        default="triton",
        metadata=_doc("of the fused pass: triton, its own kernels; flash: FlashAttention 4, faster, see the README"),
    )
    recompute_mlp: bool = field(
        default=False,
        metadata=_doc("make the MLP's inputs again in the backward pass: over a third less memory, 9% slower"),
    )
    checkpoint_every: int = field(default=500, metadata=_doc("steps between checkpoints"))
    keep_checkpoints: int = field(default=3, metadata=_doc("newest checkpoints kept, beside the best by --eval-every"))
    seed: int = field(default=0, metadata=_doc("initial weights and order of conversations"))
    device: str = field(default="auto", metadata=_doc("cuda, cuda:N, cpu, or auto"))
    track: str = field(
        default="off", metadata=_doc("report to wandb, wandb-offline or tensorboard, beside metrics.jsonl; or off")
    )
    track_project: str = field(default="draftcache", metadata=_doc("project of Weights & Biases"))
    track_group: str = field(default="", metadata=_doc("group of Weights & Biases, such as the name of a sweep"))

    def __post_init__(self) -> None:
        for name in ("splits", "layer_types"):  # JSON has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        neutral = {item.name: item.default for item in fields(self)}
        if (foreign := foreign_setting(vars(self), neutral)) is not None:
            name, owners = foreign
            raise InputError(
                f"--{name.replace('_', '-')}: expected it with --draft {' or '.join(owners)}, which has it, found "
                f"--draft {self.draft}"
            )
        for name, value in own_values(vars(self), neutral).items():
            object.__setattr__(self, name, value)
        require_finite(self)
        for name in (
            "epochs",
            "batch_conversations",
            "loss_chunk",
            "checkpoint_every",
            "keep_checkpoints",
            "eval_conversations",
        ):
            _require(name, getattr(self, name) >= 1, "at least 1", getattr(self, name))
        for name in ("learning_rate", "max_grad_norm", "step_decay", "rope_theta", "prefetch_gb"):
            _require(name, getattr(self, name) > 0, "above 0", getattr(self, name))
        for name in ("warmup_ratio", "final_lr_ratio"):
            _require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1", getattr(self, name))
        for name in ("beta1", "beta2"):
            _require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1", getattr(self, name))
        for name in ("data_share", "anchor_share"):
            _require(name, 0 < getattr(self, name) <= 1, "above 0 and at most 1", getattr(self, name))
        _require("mask_token_id", self.mask_token_id >= -1, "a token id, or -1", self.mask_token_id)
        for name in ("seed", "order_seed"):
            value = getattr(self, name)
            _require(name, value is None or 0 <= value < 2**63, "0 or more, below 2^63", value)
        for name in (
            "eval_every",
            "ttt_steps",
            "block_size",
            "num_hidden_layers",
            "markov_rank",
            "draft_vocab_size",
            "sliding_window",
            "intermediate_size",
            "weight_decay",
            "pack_tokens",
            "top_k",
        ):
            _require(name, getattr(self, name) >= 0, "0 or more", getattr(self, name))
        once = bool(self.splits) and len(set(self.splits)) == len(self.splits)
        _require("splits", once, "every split once, and at least one", self.splits)
        for name, choices in CHOICES.items():
            _require(name, getattr(self, name) in choices, f"one of {choices}", getattr(self, name))
        turns = self.step_weights == "decay" or self.loss_rows == "turns"
        _require("loss_rows", turns, "turns with d-pace", self.loss_rows)
        _require("eval_split", not (self.eval_every and not self.eval_split), "a split with --eval-every", None)
        _require("remap_vocab", not self.remap_vocab or self.init_from is not None, "--init-from with it", None)

    def objective(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the run that it continues.

        The draft vocabulary is not among them: it is compared by its hash and size, whichever flag has chosen it.
        """
        loose = {
            "store",
            "output",
            "init_from",
            "remap_vocab",
            "device",
            "track",
            "track_project",
            "track_group",
            "checkpoint_every",
        }
        loose |= {"keep_checkpoints", "eval_split", "eval_every", "eval_conversations", "loss_chunk"}
        loose |= {"compute", "attention", "recompute_mlp"}
        loose |= {"draft_vocab_size", "pack_tokens", "prefetch_gb"}
        values = {name: value for name, value in asdict(self).items() if name not in loose}
        return values | {"splits": list(self.splits), "layer_types": list(self.layer_types)}

    def to_json(self) -> dict[str, Any]:
        """Return all settings as JSON values."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """Return the settings of `to_json`. Raises InputError for a value out of range."""
        start = values["init_from"]
        given = {"output": Path(values["output"]), "init_from": None if start is None else Path(start)}
        return cls(**values | given)

    def reading(self) -> dict[str, Any]:
        """Return the settings that decide what is read of a store, and in which order."""
        names = ("splits", "order", "epochs", "batch_conversations", "pack_tokens", "data_share")
        seed = self.seed if self.order_seed is None else self.order_seed
        return {name: getattr(self, name) for name in names} | {"order_seed": seed}

    def everywhere(self) -> dict[str, Any]:
        """Return the settings that all ranks of a run must share. Paths may differ from machine to machine."""
        apart = {"store", "output", "init_from", "device", "prefetch_gb", "track", "track_project", "track_group"}
        return {name: value for name, value in asdict(self).items() if name not in apart}

    @classmethod
    def objective_defaults(cls) -> dict[str, Any]:
        """Return the default of every setting that has one: its value in runs that are older than the setting."""
        defaults = {item.name: item.default for item in fields(cls) if item.default is not MISSING}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}


def _require(name: str, holds: bool, expected: str, found: Any) -> None:
    if not holds:
        raise InputError(f"--{name.replace('_', '-')}: expected {expected}, found {found!r}")
