"""Export of a checkpoint in the form that an inference engine loads: config.json, model.safetensors and a model card.

The draft's architecture decides what the first two contain. This module has them checked as `draftcache export --check`
checks any draft, and then publishes all three together or not at all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from draftcache.draft_train.checkpoint import load_draft, load_state, load_vocab_map, resolve_checkpoint
from draftcache.draft_train.drafts.protocol import Architecture, CheckpointState
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.drafts.served_draft import CONFIG, WEIGHTS
from draftcache.draft_train.drafts.serving_target import FORMS, ServingTarget, VerifierFacts
from draftcache.draft_train.licence import verifier_licence
from draftcache.draft_train.model_card import CARD, CardFacts, evaluations_of, model_card
from draftcache.draft_train.served_report import report_on
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.store.common.files import atomic_directory
from draftcache.store.common.tensor_files import save_tensors

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FILES = (CONFIG, WEIGHTS, CARD)
"""What an export consists of."""


def export(
    checkpoint: Path,
    output: Path,
    *,
    engine: str,
    engine_version: str | None = None,
    form: str = FORMS[0],
    dtype: str = "bfloat16",
    max_position_embeddings: int | None = None,
    verifier: Path | None = None,
    base_model: str | None = None,
    evaluations: Sequence[Path] = (),
    force: bool = False,
) -> Path:
    """Write the served form of a checkpoint (or of a run's newest checkpoint) to the directory `output`; return it.

    `engine` is "vllm" or "sglang", `engine_version` its version, which is needed where versions read a draft in two
    ways. `form` is "classic" or "speculators", `dtype` one of `DTYPES`. Engines let the draft propose within its
    `max_position_embeddings`, by default those of `served_positions`. `verifier` is the verifier's directory: its
    licence is named in the model card, and the draft is compared with its config.json. `base_model` is what the
    verifier is called in the card and in the speculators form, by default the name in the checkpoint. `evaluations` are
    files of `draftcache eval --output` for the card, by default those in the run's directory. An engine that is known
    not to serve such a draft beside its verifier is refused, or with `force` warned of on stderr.

    Raises CheckpointError for an incomplete or mismatched checkpoint, InputError if `output` exists, the draft can't be
    exported for this engine, its version has to be named, no number of positions is known, or `force` has nothing to
    force.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype: expected one of {list(DTYPES)}, found {dtype!r}")
    if output.exists():
        raise InputError(f"{output}: expected a new directory, found one that exists; remove it or choose another")
    target = ServingTarget(engine=engine, version=engine_version, form=form, verifier_name=base_model)
    path = resolve_checkpoint(checkpoint)
    state = load_state(path)
    architecture = find_architecture(state.architecture)
    _require_loadable(architecture, target)
    facts = VerifierFacts.of_manifest(state.verifier)
    if verifier is not None:
        facts = VerifierFacts.of_config(verifier).filled_from(facts)
    _require_served(architecture, state, target, force)
    card = CardFacts(
        state=state,
        target=target,
        dtype=dtype,
        licence=verifier_licence(verifier),
        evaluations=evaluations_of(path, state, evaluations),
    )
    positions = served_positions(path, state, max_position_embeddings)
    state = replace(state, verifier=state.verifier | {"max_position_embeddings": positions})
    vocab_map = load_vocab_map(path, state)
    draft = load_draft(path, state, torch.device("cpu"))
    form_of_draft = draft.served_form(state, vocab_map, target=target, dtype=DTYPES[dtype])
    _require_finite(path, form_of_draft.tensors)
    with atomic_directory(output) as partial:
        save_tensors(partial / WEIGHTS, form_of_draft.tensors, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(form_of_draft.config, indent=2) + "\n", encoding="utf-8")
        _read_back(path, partial, architecture, target, facts)
        (partial / CARD).write_text(model_card(card, partial), encoding="utf-8")
    return output


def _require_loadable(architecture: Architecture, target: ServingTarget) -> None:
    """Raise InputError for an engine or a form in which drafts of this architecture are not exported."""
    if target.engine not in architecture.engines:
        raise InputError(
            f"--engine: expected one of {list(architecture.engines)} for a draft of {architecture.name}, "
            f"found {target.engine!r}"
        )
    if target.form not in architecture.forms:
        raise InputError(
            f"--format: expected one of {list(architecture.forms)} for a draft of {architecture.name}, found "
            f"{target.form!r}"
        )
    if target.form == "speculators" and target.engine == "sglang":
        raise InputError(
            "--format speculators: expected --engine vllm, found sglang, which does not read that form (looked for up "
            "to 0.5.23); leave --format out"
        )


def _require_served(architecture: Architecture, state: CheckpointState, target: ServingTarget, force: bool) -> None:
    """Raise InputError where the engine is known not to serve the draft, unless `force`, which has to be needed."""
    engine = target.engine
    reason = architecture.why_not_served(VerifierFacts.of_manifest(state.verifier), engine)
    if reason is None:
        if force:
            raise InputError(
                f"--force: expected an engine that is known not to serve this draft, found --engine {engine}, of which "
                "nothing is known against it; leave --force out"
            )
        return
    named = f"the draft of {state.verifier['name']}"
    if not force:
        raise InputError(
            f"--engine: expected an engine that serves {named}, found {engine}: {reason}; --force exports it all the "
            "same"
        )
    print(f"draftcache export: warning: {engine} is known not to serve {named}: {reason}", file=sys.stderr)


def _require_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError where a weight of an export is NaN or infinite."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{path}: its draft cannot be served, nothing was exported: {name}: expected finite weights, found NaN "
                "or infinity"
            )


def _read_back(
    path: Path, written: Path, architecture: Architecture, target: ServingTarget, verifier: VerifierFacts
) -> None:
    """Check what was written, as any draft is checked: raise CheckpointError for errors, print warnings on stderr.

    What `_require_served` has judged is not judged again.
    """
    report = report_on(written, architecture, target, verifier)
    if wrong := [item for item in report.errors if item.trap != "engine"]:
        raise CheckpointError(f"{path}: its draft cannot be served, nothing was exported: {wrong[0]}")
    for item in report.warnings:
        print(f"draftcache export: warning: {item}", file=sys.stderr)


def served_positions(path: Path, state: CheckpointState, asked: int | None = None) -> int:
    """Return the number of positions that an exported draft declares: `asked`, or else the verifier's own.

    A verifier may name none (its positions are not limited). Then it is the store's longest conversation, rounded up to
    a power of two: longer ones the draft was never trained on. Raises InputError for a number below 1, and where the
    checkpoint `path` knows neither.
    """
    if asked is not None:
        if asked < 1:
            raise InputError(f"--max-position-embeddings: expected at least 1, found {asked}")
        return asked
    if own := state.verifier.get("max_position_embeddings"):
        return int(own)
    if state.longest:
        return 1 << (state.longest - 1).bit_length()
    raise InputError(
        f"{path}: expected the verifier's max_position_embeddings, or the length of the longest conversation, found "
        "neither, as an earlier version of draftcache wrote it; give the length that will be served by "
        "--max-position-embeddings"
    )
