"""`draftcache export`: write a checkpoint in the form that an inference engine serves, or check such files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftcache.tools.results import add_json, show

_ONLY_EXPORT = ("checkpoint", "output", "max_position_embeddings", "base_model", "evaluations", "force")
_ENGINES = ("vllm", "sglang")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the export's flags."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint, or a training --output (its newest)"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument("--engine", required=True, choices=_ENGINES, help="whose convention numbers the aux layers")
    parser.add_argument(
        "--engine-version",
        metavar="VERSION",
        help="version of the engine, such as 0.5.13; asked for where versions read a draft in two ways",
    )
    parser.add_argument(
        "--format",
        default="classic",
        choices=("classic", "speculators"),
        help="the form of config.json and the names of tensors: the engines' own, or that of the speculators library, "
        "which vLLM serves by the draft's name alone",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--max-position-embeddings",
        type=int,
        help="length up to which the draft is served; default: the verifier's, or the store's longest, rounded up",
    )
    parser.add_argument(
        "--verifier",
        type=Path,
        metavar="DIR",
        help="the verifier's directory: its licence goes into the model card, and the draft is held against its "
        "config.json; no weights are read",
    )
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="the verifier's name in the model card and in the speculators form; default: its directory's at capture",
    )
    parser.add_argument(
        "--evaluations",
        type=lambda text: tuple(map(Path, text.split(","))),
        metavar="FILE,FILE",
        help="files of `draftcache eval --output` for the model card; default: those in the run's directory",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="export for an engine that is known not to serve this draft, which is refused otherwise: "
        "an Eagle3 draft of a NemotronH for sglang; refused itself where nothing is to be forced",
    )
    parser.add_argument(
        "--check",
        action=_InsteadOfExport,
        type=Path,
        metavar="DIR",
        help="export nothing: look in this draft, whoever exported it, for what engines do not report (for --engine; "
        "default: the one that draftcache exported it for, or vllm); exits with 1 where there are errors",
    )
    add_json(parser)


class _InsteadOfExport(argparse.Action):
    """Takes the flag's value; what an export needs is then not required."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        for action in parser._actions:
            action.required = False
        setattr(namespace, self.dest, values)


def run(arguments: argparse.Namespace) -> int:
    """Write config.json, model.safetensors and README.md into the output directory, or check a directory.

    Returns 0, or 1 where --check found errors. Raises InputError for flags that do not fit.
    """
    from draftcache.store.common.errors import InputError

    if arguments.check is not None:
        if wrong := [name for name in _ONLY_EXPORT if getattr(arguments, name)]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
            raise InputError(f"--check: expected no flag of an export beside it, found {flags}; leave them out")
        return _check(arguments)
    return _export(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from draftcache.draft_train.served_report import check_export

    report = check_export(
        arguments.check,
        engine=arguments.engine,
        engine_version=arguments.engine_version,
        verifier=arguments.verifier,
    )
    show(arguments, report.to_json(), report.text())
    return 1 if report.errors else 0


def _export(arguments: argparse.Namespace) -> int:
    from draftcache.draft_train.export import FILES, export

    path = export(
        arguments.checkpoint,
        arguments.output,
        engine=arguments.engine,
        engine_version=arguments.engine_version,
        form=arguments.format,
        dtype=arguments.dtype,
        max_position_embeddings=arguments.max_position_embeddings,
        verifier=arguments.verifier,
        base_model=arguments.base_model,
        evaluations=arguments.evaluations or (),
        force=arguments.force,
    )
    values = {
        "output": str(path),
        "files": list(FILES),
        "engine": arguments.engine,
        "engine_version": arguments.engine_version,
        "form": arguments.format,
        "dtype": arguments.dtype,
    }
    files = f"{', '.join(FILES[:-1])} and {FILES[-1]}"
    show(arguments, values, f"{path}: {files} for {arguments.engine}, {arguments.format} form")
    return 0
