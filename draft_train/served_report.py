"""The check of a draft that an engine is to serve: `draftcache export --check`, and the exporter's own reading back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from draftcache.draft_train.drafts.protocol import Architecture
from draftcache.draft_train.drafts.registry import architecture_names, find_architecture
from draftcache.draft_train.drafts.served_draft import Finding, ServedDraft, read_config
from draftcache.draft_train.drafts.serving_target import FORMS, ServingTarget, VerifierFacts
from draftcache.store.common.errors import InputError

DEFAULT_ENGINE = "vllm"


@dataclass(frozen=True, kw_only=True)
class ServedReport:
    """What was found in a draft's directory."""

    path: Path
    architecture: str
    target: ServingTarget
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> list[Finding]:
        """The findings for which the draft is served wrongly or not at all."""
        return [item for item in self.findings if item.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """The findings that depend on what is not known."""
        return [item for item in self.findings if item.level == "warning"]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "path": str(self.path),
            "architecture": self.architecture,
            "form": self.target.form,
            "engine": self.target.engine,
            "engine_version": self.target.version,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "findings": [asdict(item) for item in self.findings],
        }

    def text(self) -> str:
        """Return the report for people: a line for each finding, and one for the whole."""
        target = self.target
        version = "" if target.version is None else f" {target.version}"
        lines = [f"{item.level.upper()} {item.trap}: {item}" for item in (*self.errors, *self.warnings)]
        lines.append(
            f"{self.path}: {self.architecture} in the {target.form} form, looked at for {target.engine}{version}: "
            f"errors {len(self.errors)}, warnings {len(self.warnings)}"
        )
        return "\n".join(lines)


def check_export(
    path: Path,
    *,
    engine: str | None = None,
    engine_version: str | None = None,
    verifier: Path | VerifierFacts | None = None,
) -> ServedReport:
    """Look for what engines do not report in a draft's directory, whoever exported it.

    Reads config.json, headers of safetensors files and the vocabulary map, and no weights. `engine` and its version are
    by default those that draftcache exported the draft for, or vLLM. `verifier` is the directory of the verifier, of
    which config.json is read, or what is known of it; with it widths, ids and the number of blocks are compared too.

    Raises InputError where the directory holds no draft, or one of an architecture that is not known.
    """
    config = read_config(path)
    found = config.get("draftcache")
    ours: dict[str, Any] = found if isinstance(found, dict) else {}
    engine, recorded = engine or ours.get("engine") or DEFAULT_ENGINE, ours.get("engine_version")
    version = engine_version or (recorded if engine == ours.get("engine") else None)
    form = FORMS["speculators_model_type" in config]
    target = ServingTarget(engine=engine, version=version, form=form)
    architecture = recognise(path, config)
    if engine not in (known := ("vllm", "sglang", *architecture.engines)):
        raise InputError(f"--engine: expected one of {sorted(set(known))}, found {engine!r}")
    facts = VerifierFacts.of_config(verifier) if isinstance(verifier, Path) else verifier or VerifierFacts()
    written_down = VerifierFacts(model_type=ours.get("verifier_model_type"), layers=ours.get("verifier_layers"))
    facts = facts.filled_from(written_down)
    return report_on(path, architecture, target, facts)


def report_on(path: Path, architecture: Architecture, target: ServingTarget, verifier: VerifierFacts) -> ServedReport:
    """Return what is wrong with a draft of this architecture. Raises InputError where the files can't be read."""
    found = tuple(architecture.served_findings(ServedDraft.read(path, target, verifier)))
    return ServedReport(path=path, architecture=architecture.name, target=target, findings=found)


def recognise(path: Path, config: dict[str, Any]) -> Architecture:
    """Return the architecture of a config.json. Raises InputError where it names none that is known."""
    names = [config.get("speculators_model_type"), *(config.get("architectures") or [])]
    for architecture in map(find_architecture, architecture_names()):
        if set(names) & set(architecture.served_as):
            return architecture
    known = sorted({name for known in map(find_architecture, architecture_names()) for name in known.served_as})
    raise InputError(
        f"{path}: expected a draft, of which architectures or speculators_model_type is one of {known}, found "
        f"{[name for name in names if name]}; other drafts are not known here"
    )
