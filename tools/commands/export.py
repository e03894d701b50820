"""`draftcache export`: write a checkpoint in the form that an inference engine serves."""

from __future__ import annotations

import argparse
from pathlib import Path

from draftcache.tools.results import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the export's flags."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint, or a training --output (its newest)"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory to create")
    parser.add_argument(
        "--engine", required=True, choices=("vllm", "sglang"), help="whose convention numbers the aux layers"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--max-position-embeddings",
        type=int,
        help="length up to which the draft is served; default: the verifier's, or the store's longest, rounded up",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="export for an engine that is known not to serve this draft, which is refused otherwise: "
        "an Eagle3 draft of a NemotronH for sglang; refused itself where nothing is to be forced",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write config.json and model.safetensors into the output directory. Returns 0."""
    from draftcache.draft_train.export import export

    path = export(
        arguments.checkpoint,
        arguments.output,
        engine=arguments.engine,
        dtype=arguments.dtype,
        max_position_embeddings=arguments.max_position_embeddings,
        force=arguments.force,
    )
    files = ["config.json", "model.safetensors"]
    values = {"output": str(path), "files": files, "engine": arguments.engine, "dtype": arguments.dtype}
    show(arguments, values, f"{path}: {' and '.join(files)} for {arguments.engine}")
    return 0
