"""Hidden states at the taps: those that the engine extracts, beside draftcache's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from draftcache.tools.engine_check.engine import Engine
from draftcache.tools.engine_check.verdicts import Verdict
from draftcache.tools.probe.compare import Comparison, compare_files
from draftcache.tools.probe.dump import ProbeConfig, dump_states

DTYPE = "bfloat16"
"""The engine's, which serves in it."""
TOLERANCE = 1e-2
"""The largest |a - b| / |b| of a tap's states, the engine's in bfloat16 and ours in float32."""
ROUNDING = 1.25
"""By how much the engine's difference may be above that of our own forward in bfloat16, where that is the larger
bound: on random weights bfloat16 alone makes 1.3 %."""
OFFSET = 1
"""vLLM's id of a block's output minus the block's number."""


def extraction_options(layers: tuple[int, ...], directory: Path) -> dict[str, Any]:
    """Return the options of `vllm.LLM` with which it writes the outputs of these blocks to files in `directory`."""
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": list(_ids(layers))}},
        },
        "kv_transfer_config": {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(directory.absolute())},
        },
        "enable_chunked_prefill": False,
    }


def check_states(
    engine: Engine, verifier: Path, layers: tuple[int, ...], directory: Path, *, device: str, reference: str
) -> Verdict:
    """Return whether the engine's states by its own ids are our blocks' outputs, with no better fitting block beside.

    The engine's are computed in bfloat16, ours on `device` in the dtype `reference`, on the text of `draftcache probe`.
    """
    ours = _dump(verifier, layers, directory, reference, device)
    prompt = load_file(ours)["token_ids"].tolist()
    options = extraction_options(layers, directory / "extracted") | {"dtype": DTYPE}
    answer = engine.answers("states", "vLLM's hidden states", verifier, [prompt], 1, **options)
    written = Path(answer["outputs"][0]["hidden_states"])
    rounded = _dump(verifier, layers, directory, "bfloat16", device)
    rounding = {match.block: match.difference or 0.0 for match in compare_files(rounded, ours, tolerance=0.5).matches}
    return judge_states(compare_files(ours, written, ids=_ids(layers), tolerance=0.5), layers, rounding, reference)


def judge_states(
    found: Comparison, layers: tuple[int, ...], rounding: Mapping[int | None, float], reference: str
) -> Verdict:
    """Return the verdict on a comparison with the engine's file. `rounding` is our own of bfloat16, by block."""
    by_block = {match.block: match for match in found.matches if match.difference is not None}
    bounds = {layer: max(TOLERANCE, ROUNDING * rounding.get(layer, 0.0)) for layer in layers}
    if reference == "bfloat16":  # both round
        bounds = {layer: 2 * bound for layer, bound in bounds.items()}
    apart = {layer: by_block[layer].difference or 0.0 for layer in layers if layer in by_block}
    near = all(layer in apart and apart[layer] <= bound for layer, bound in bounds.items())
    offsets = sorted({match.offset - OFFSET for match in found.matches if match.offset is not None})
    unit = f"|a-b|/|b|, {DTYPE} against {reference}"
    metrics = [(f"difference@block{layer}", value, unit) for layer, value in apart.items()]
    metrics += [(f"own_rounding@block{layer}", rounding[layer], unit) for layer in layers if layer in rounding]
    if seconds := [match.second_difference for match in found.matches if match.second_difference is not None]:
        metrics.append(("next_nearest_block", min(seconds), unit))
    words = ", ".join(f"block {layer} {value:.1e} (bound {bounds[layer]:.1e})" for layer, value in apart.items())
    next_best = f"; the next nearest block is {min(seconds):.1e} away" if seconds else ""
    passed = found.fits and near and found.taps == dict(zip(layers, _ids(layers), strict=True))
    return Verdict(
        "states", "states", passed, f"{found.verdict}; best layer offsets {offsets}; {words}{next_best}", tuple(metrics)
    )


def _ids(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(layer + OFFSET for layer in layers)


def _dump(verifier: Path, layers: tuple[int, ...], directory: Path, dtype: str, device: str) -> Path:
    """Return the file of our own states in a dtype, made where it is not there yet."""
    output = directory / f"ours-{dtype}.safetensors"
    if not output.exists():
        dump_states(ProbeConfig(verifier=verifier, output=output, layers=layers, compute_dtype=dtype, device=device))
    return output
