"""README.md of an export: what the draft is, how it was made, how well it does, and how it is served.

Every line follows from the checkpoint, the files of the export and the evaluations, so that the same checkpoint gives
the same bytes: no date, no machine, no path and not the directory's name stands in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.drafts.serving_target import ServingTarget
from draftcache.draft_train.eval_record import KIND, read_evaluation
from draftcache.draft_train.licence import Licence
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.files import read_json

CARD = "README.md"
_HERE = "DRAFT"
"""What the export's directory is called in the card: its name is no part of what it holds."""
_SETTINGS = (
    "splits", "epochs", "batch_conversations", "learning_rate", "loss", "ttt_steps", "teacher", "init_from", "seed",
)  # fmt: skip
"""Settings of the objective that stand first in the recipe; the others follow by name."""


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a model card tells, beside the files that it stands with."""

    state: CheckpointState
    target: ServingTarget
    dtype: str
    licence: Licence
    evaluations: tuple[dict[str, Any], ...] = ()
    """What `draftcache eval --output` wrote of this checkpoint."""

    @property
    def verifier(self) -> str:
        """What the verifier is called."""
        return self.target.verifier_name or str(self.state.verifier["name"])


def evaluations_of(checkpoint: Path, state: CheckpointState, given: Sequence[Path]) -> tuple[dict[str, Any], ...]:
    """Return the evaluations of a checkpoint: those of the files `given`, or else of JSON files in its run's directory.

    Raises InputError for a given file that holds none, or one of another step of another draft.
    """
    if given:
        found = [(path, read_evaluation(path)) for path in given]
        for path, body in found:
            if not _is_of(body, checkpoint, state):
                wanted, seen = (
                    f"{checkpoint.name}, step {state.step}",
                    f"{body.get('checkpoint')}, step {body.get('step')}",
                )
                raise InputError(
                    f"--evaluations {path}: expected an evaluation of {wanted}, found one of {seen}; evaluate this "
                    "checkpoint, or leave the file out"
                )
        return tuple(body for _, body in found)
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    bodies = map(_evaluation, sorted(run.glob("*.json")))
    return tuple(body for body in bodies if body is not None and _is_of(body, checkpoint, state))


def _evaluation(path: Path) -> dict[str, Any] | None:
    try:
        body = read_json(path)
    except (DraftcacheError, OSError, ValueError):
        return None
    return body if isinstance(body, dict) and body.get("kind") == KIND else None


def _is_of(body: dict[str, Any], checkpoint: Path, state: CheckpointState) -> bool:
    return (body.get("checkpoint"), body.get("step")) == (checkpoint.name, state.step)


def model_card(facts: CardFacts, directory: Path) -> str:
    """Return the text of README.md for an export whose other files are in `directory`."""
    parts = [_front_matter(facts), *_summary(facts), *_acceptance(facts), *_recipe(facts), *_files(directory)]
    return "\n".join(parts) + "\n"


def _front_matter(facts: CardFacts) -> str:
    """Return the YAML that the hub reads. A field that is not known is left out."""
    fields: dict[str, Any] = {
        **({"library_name": "speculators"} if facts.target.form == "speculators" else {}),
        "tags": ["speculative-decoding", "draft-model", facts.state.architecture, facts.target.engine, "draftcache"],
        "base_model": facts.verifier,
    }
    if facts.licence.name is not None:
        fields["license"] = facts.licence.name
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _summary(facts: CardFacts) -> Iterator[str]:
    state, target = facts.state, facts.target
    architecture = find_architecture(state.architecture)
    tokens = architecture.draft_tokens(state.shape, state.objective)
    version = f" {target.version}" if target.version else ""
    yield f"# {state.architecture} draft of {facts.verifier}\n"
    yield (
        f"A draft for speculative decoding with {facts.verifier}, trained by draftcache and exported in {facts.dtype}, "
        f"in the {target.form} form, for {target.engine}{version}. Other engines may number the verifier's "
        "layers otherwise: `draftcache export --check` tells.\n"
    )
    yield "## Serving\n"
    yield f"```\n{architecture.serve_command(target, facts.verifier, _HERE, tokens, state.shape)}\n```\n"
    yield f"where {_HERE} stands for this directory.\n"
    if target.form == "speculators":
        yield f"or, as config.json names the verifier and the tokens per step, `vllm serve {_HERE}`.\n"
    yield "## Licence\n"
    yield f"{facts.licence.source} A draft is made from its verifier's outputs, embeddings and head.\n"


def _acceptance(facts: CardFacts) -> Iterator[str]:
    yield "## Acceptance\n"
    if not facts.evaluations:
        yield "No evaluation was at hand. `draftcache eval --output` measures it, and `--evaluations` puts it here.\n"
        return
    for body in facts.evaluations:
        yield (
            f"Tokens per verify step with {body['draft_tokens']} draft tokens, on the store {body['store_hash']}, with "
            f"intervals at {body['level']:.0%} over conversations.\n"
        )
        yield "| split | positions | conversations | verify steps | tokens | acceptance length | interval | |"
        yield "|---|---|---:|---:|---:|---:|---|---|"
        for split, found in body["splits"].items():
            draft = found["draft"]
            yield _row(split, "all", draft, draft["kind"])
            for bucket in draft["by_position"]:
                last = "on" if bucket["to"] is None else f"to {bucket['to'] - 1}"
                yield _row(split, f"{bucket['from']} {last}", bucket, "")
        yield ""


def _row(split: str, positions: str, found: dict[str, Any], kind: str) -> str:
    span = found.get("interval")
    shown = "" if span is None else f"{span[0]:.3f} to {span[1]:.3f}"
    counts = " | ".join(f"{found[name]:,}" for name in ("conversations", "verify_steps", "tokens"))
    return f"| {split} | {positions} | {counts} | {found['acceptance_length']:.3f} | {shown} | {kind} |"


def _recipe(facts: CardFacts) -> Iterator[str]:
    state = facts.state
    objective = dict(state.objective)
    first = {name: objective.pop(name) for name in _SETTINGS if name in objective}
    code = f"{state.code.get('version', 'unknown')} (commit {state.code.get('commit', 'unknown')})"
    finished = "" if state.finished else ", before the end of its run"
    rows = {
        "optimizer steps": f"{state.step:,}{finished}",
        "draftcache": code,
        "store (xxh3-128)": state.store_hash,
        "vocabulary map (xxh3-128)": state.draft_vocab_hash,
        "verifier weights (xxh3-128)": state.verifier.get("weights_hash"),
        "outputs of blocks, from 0": [tap["layer"] for tap in state.taps],
        "longest conversation": f"{state.longest:,} tokens" if state.longest else "unknown",
    }
    yield "## Recipe\n"
    yield "| | |\n|---|---|"
    for name, value in (*rows.items(), *first.items(), *sorted(objective.items())):
        yield f"| {name} | {_cell(value)} |"
    yield "\nThe draft's shape:\n"
    yield "| | |\n|---|---|"
    for name, value in asdict(state.shape).items():
        yield f"| {name} | {_cell(value)} |"
    yield ""


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)


def _files(directory: Path) -> Iterator[str]:
    yield "## Files\n"
    yield "| file | bytes | sha256 |\n|---|---:|---|"
    for path in sorted(directory.iterdir()):
        if path.name != CARD:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            yield f"| {path.name} | {path.stat().st_size:,} | {digest} |"
