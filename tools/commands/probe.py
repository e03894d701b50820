"""`draftcache probe`: dump the verifier's states for a fixed input, or compare such a dump with another engine's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftcache.tools.arguments import finite_number
from draftcache.tools.results import add_json, show

if TYPE_CHECKING:
    from draftcache.tools.probe.compare import Comparison, Match

_INPUT = ("output", "layers", "text", "token_ids", "only_layers", "source")
_DUMP_ONLY = (*_INPUT, "device", "compute_dtype", "allow_fallback", "trust_remote_code")
_COMPARE_ONLY = ("ids", "axis", "tolerance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of both uses: --verifier dumps states, --compare compares them. `run` refuses to mix the two."""
    use = parser.add_mutually_exclusive_group(required=True)
    use.add_argument("--verifier", type=Path, metavar="DIR", help="dump: directory of a Hugging Face causal LM")
    use.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("OURS", "OTHER"),
        help="a dump, and the safetensors file of another forward on its token_ids: another dump, Hugging Face's "
        "output_hidden_states (hidden_states.I, or stacked) or what vLLM's extract_hidden_states wrote",
    )
    dump = parser.add_argument_group("with --verifier")
    dump.add_argument("--output", type=Path, metavar="FILE", help="safetensors file to write")
    dump.add_argument("--layers", metavar="A,B,C", help="taps of interest: blocks counted from 0, ascending")
    given = dump.add_mutually_exclusive_group()
    given.add_argument("--text", help="input, no special tokens added (default: a fixed text of about 250 tokens)")
    given.add_argument("--token-ids", metavar="A,B,..", help="input, as token ids")
    dump.add_argument("--only-layers", action="store_true", help="dump the taps alone (default: every block)")
    dump.add_argument(
        "--source",
        choices=("draftcache", "transformers"),
        help="the forward that capture runs (default), or the model's own output_hidden_states, "
        "under the same fp32 state contract",
    )
    dump.add_argument("--device", help="cuda, cuda:N, cpu, or auto (default)")
    dump.add_argument(
        "--compute-dtype",
        choices=("auto", "bfloat16", "float32"),
        help="auto (default) is bfloat16 on a GPU, else float32",
    )
    dump.add_argument("--allow-fallback", action="store_true", help="on a GPU, run without mamba-ssm's kernels")
    dump.add_argument("--trust-remote-code", action="store_true", help="run code that the checkpoint brings along")
    compare = parser.add_argument_group("with --compare")
    compare.add_argument("--ids", metavar="A,B,..", help="ids of a stacked tensor's layers (default: 0,1,..)")
    compare.add_argument("--axis", type=int, choices=(0, 1), help="the stacked tensor's axis of layers, if both may be")
    compare.add_argument(
        "--tolerance",
        type=finite_number,
        metavar="X",
        help="largest |ours - other| / |other| of a match (default: 0.05)",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Dump or compare states. Returns 1 if a comparison found no single offset that fits every state, else 0.

    Raises InputError for flags that do not go together.
    """
    from draftcache.store.common.errors import InputError

    unused = _COMPARE_ONLY if arguments.compare is None else _DUMP_ONLY
    for name in unused:
        if getattr(arguments, name) not in (None, False):
            use = "--compare" if arguments.compare is None else "--verifier"
            raise InputError(f"--{name.replace('_', '-')}: expected {use} beside it, found the other use of probe")
    return _dump(arguments) if arguments.compare is None else _compare(arguments)


def _dump(arguments: argparse.Namespace) -> int:
    from draftcache.store.common.errors import InputError

    for name in ("output", "layers"):
        if getattr(arguments, name) is None:
            raise InputError(f"--{name}: expected beside --verifier, found none")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in _DUMP_ONLY}
    for name in ("layers", "token_ids"):
        if settings[name] is not None:
            settings[name] = parse_numbers(f"--{name.replace('_', '-')}", settings[name])

    from draftcache.tools.probe.dump import ProbeConfig, dump_states

    given = {name: value for name, value in settings.items() if value is not None}
    details = dump_states(ProbeConfig(verifier=arguments.verifier, **given))
    show(arguments, {"output": str(arguments.output), **details}, format_dump(arguments.output, details))
    return 0


def format_dump(output: Path, details: dict[str, Any]) -> str:
    """Format what `draftcache.tools.probe.dump.dump_states` returns: a line on all states, then one per tap."""
    lines = [
        f"{output}: {len(details['tensors'])} states of {details['tokens']} tokens, {details['dtype']}, "
        f"forward {details['forward']}, SSM state {'proved float32' if details['ssm'] else 'none'}"
    ]
    for layer in details["layers"]:
        names = details["tensors"][f"hidden_states.{layer}"]
        index = names["hf_hidden_states_index"]
        lines.append(
            f"  tap: output of block {layer} = "
            + (f"HF hidden_states[{index}]" if index is not None else "no entry of HF's hidden_states")
            + f" = vLLM aux id {names['vllm_aux_id']}"
        )
    lines.append("Run the other engine on this file's token_ids, then: draftcache probe --compare THIS ITS_FILE")
    return "\n".join(lines)


def _compare(arguments: argparse.Namespace) -> int:
    from draftcache.store.common.errors import InputError
    from draftcache.tools.probe.compare import TOLERANCE, compare_files

    ids = None if arguments.ids is None else parse_numbers("--ids", arguments.ids)
    if ids is not None and list(ids) != sorted(set(ids)):
        raise InputError(
            f"--ids: expected ascending, distinct ids, found {list(ids)}; engines stack states in the order of the "
            "layers, in whatever order the ids were configured"
        )
    ours, other = arguments.compare
    tolerance = TOLERANCE if arguments.tolerance is None else arguments.tolerance
    found = compare_files(ours, other, ids=ids, layer_axis=arguments.axis, tolerance=tolerance)
    show(arguments, found.to_json(), format_comparison(found))
    return 0 if found.fits else 1


def parse_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Parse `A,B,C` into numbers >= 0. Raises InputError, which names `flag`, for any other text."""
    from draftcache.store.common.errors import InputError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise InputError(f"{flag}: expected numbers separated by commas, found {text!r}")
    return tuple(int(part) for part in parts)


def format_comparison(found: Comparison) -> str:
    """Format what `draftcache.tools.probe.compare.compare_files` returns: a line per state of OTHER, then a verdict."""
    lines = [
        f"{'other':<20} {'id':>5} {'is':<12} {'difference':>10} {'cosine':>9} {'next nearest':<12} {'difference':>10} "
        f"{'id - block':>10}",
        *(_row(match) for match in found.matches),
        "",
        *found.notes,
        found.verdict,
    ]
    if found.taps:
        taps = ", ".join(f"{block} -> {number}" for block, number in found.taps.items())
        lines.append(f"taps, block -> its id there: {taps}")
    return "\n".join(lines)


def _row(match: Match) -> str:
    cells = f"{match.name:<20} {'-' if match.number is None else match.number:>5} {match.best or '-':<12} "
    cells += f"{_figure(match.difference, '.2e'):>10} {_figure(match.cosine, '.5f'):>9} {match.second or '-':<12} "
    cells += f"{_figure(match.second_difference, '.2e'):>10} {_figure(match.offset, '+d'):>10}"
    return f"{cells}  {match.problem.upper() if match.best is None else match.problem}" if match.problem else cells


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
