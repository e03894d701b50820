"""Checks of a training run's settings that need its ranks or its store, made before any work."""

from __future__ import annotations

import sys

from draftcache.draft_train.checkpoint import resolve_checkpoint
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.loss_rows import find_loss_rows
from draftcache.draft_train.data.teacher import TeacherView
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.drafts.sizes import VerifierShape
from draftcache.draft_train.fit import require_verifier, require_window
from draftcache.draft_train.loss.row_losses import find_loss
from draftcache.draft_train.mask_token import with_mask_token
from draftcache.draft_train.ranks import Ranks
from draftcache.draft_train.split_checks import held_out_members, trained_members
from draftcache.draft_train.state_file import read_state
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader


def require_work(config: TrainConfig, ranks: Ranks) -> None:
    """Raise InputError if a rank would never get a conversation; warn if ranks get different numbers of them."""
    size, world = config.batch_conversations, ranks.world
    problem = None
    if size < world:
        problem = InputError(
            f"--batch-conversations: expected at least one for each of the {world} ranks, found {size}: it counts "
            f"those of all ranks; pass a multiple of {world}, or start fewer ranks"
        )
    ranks.agree(problem)  # not raised before: ranks that still connect would wait for this one
    if size % world and ranks.leads:
        print(
            f"draftcache train: {world} ranks share steps of {size} conversations, so some wait for others in every "
            f"step; a multiple of {world} keeps all of them busy",
            file=sys.stderr,
        )


def require_norm(config: TrainConfig, store: StoreReader) -> None:
    """Raise InputError if the draft's RMS norm is to start as a final norm of the verifier that is none."""
    found = store.manifest.verifier.get("final_norm", "rms_norm")
    if config.head_init == "verifier" and found != "rms_norm":
        raise InputError(
            f"{store.location}: expected a verifier with an RMS norm before its head for --head-init verifier, as the "
            f"draft has one, found {found!r}; its weights mean something else there: use --head-init random"
        )


def require_trainable(config: TrainConfig, store: StoreReader) -> None:
    """Raise an error for settings that the store can't serve, without building anything: before GPU time is spent.

    Raises InputError for a loss or rows that are none, and for splits, a draft vocabulary, teacher entries, a shape or
    weights that do not fit, and
    ManifestMismatchError for a window beyond the store's.
    """
    find_loss(config.loss)
    find_loss_rows(config.loss_rows)
    require_norm(config, store)
    trained_members(store, config)
    held_out_members(store, config, say=False)
    vocab = store.manifest.teacher_form.choose(config.draft_vocab_size)
    TeacherView.of(store, vocab, config.top_k)
    config = with_mask_token(config, store)
    shape = find_architecture(config.draft).shape_for(config, VerifierShape.of(store, vocab.size))
    require_window(shape.sliding_window, store)
    if config.init_from is not None:
        path = resolve_checkpoint(config.init_from)
        require_verifier(path, read_state(path)[0], store)
