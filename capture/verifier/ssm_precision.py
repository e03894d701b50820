"""The float32 contract of Mamba states: enforced, proved by a canary and described for the manifest.

- dt limit: Hugging Face clamps dt to (time_step_min, inf); the vendor's code and serving engines use (0, inf).
  The clamp changes the model (KL 0.034 against 0.003 on the 30B checkpoint), so it is lifted on every block.
- parameters: `A_log`, `D` and `dt_bias` stay float32 where the checkpoint stores float32.
- carry: a state carried from call to call must stay float32. The canary has A = 0 and an initial state of 256,
  and adds 0.5 in each of 16 calls of 128 tokens: a float32 carry ends at 264, a bfloat16 carry stays at 256,
  because 0.5 is a quarter of bfloat16's step there.

A well-known patch makes mamba-ssm's `_state_passing_fwd` return float32. It changes no bit of a prefill in one piece:
within a call the state is carried in float32 registers, and the states that are written at the chunks' borders are cast
to C's dtype by the kernel that reads them (a test on a GPU compares scan, taps and final states). If it is applied to
the module that defines the function, it does not even run, since `ssd_combined` imported the function by name. So the
patch is not applied here; the float32 carry above is needed instead.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import DynamicCache

from draftcache.capture.kernels.scan_tiles import fix_scan_tiles
from draftcache.capture.kernels.state_space import selective_state_update
from draftcache.store.common.errors import PrecisionError

_CALLS, _CALL_TOKENS = 16, 128
_INITIAL, _ADDED = 256.0, 0.5
_FP32_PARAMETERS = ("A_log", "D", "dt_bias")
DT_LIMIT = (0.0, math.inf)


def mamba_mixers(model: nn.Module) -> list[Any]:
    """Every Mamba-2 mixer of the model, in order; empty for a model without Mamba blocks."""
    return [module for module in model.modules() if hasattr(module, "A_log") and hasattr(module, "time_step_limit")]


def lift_dt_limit(mixers: list[Any]) -> None:
    """Set the dt limit of every mixer to (0, inf)."""
    for mixer in mixers:
        mixer.time_step_limit = DT_LIMIT


def assert_dt_limit(mixers: list[Any]) -> None:
    """Raise PrecisionError unless every mixer has the dt limit (0, inf)."""
    for mixer in mixers:
        if tuple(mixer.time_step_limit) != DT_LIMIT:
            raise PrecisionError(
                f"block {mixer.layer_idx}: expected dt limit {DT_LIMIT}, found {tuple(mixer.time_step_limit)}; "
                "dt would be clamped and the captured states would not be the served model's"
            )


def restore_fp32_parameters(model: nn.Module, path: Path) -> list[str]:
    """Reload `A_log`, `D` and `dt_bias` in float32 where the checkpoint holds float32; returns the reloaded names."""
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in _FP32_PARAMETERS and parameter.dtype != torch.float32
    }
    restored = []
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                name = key if key in wanted else key.replace("backbone.", "model.", 1)
                if name in wanted and tensors.get_slice(key).get_dtype() == "F32":
                    wanted[name].data = tensors.get_tensor(key).to(wanted[name].device)
                    restored.append(name)
    return restored


def stand_in_for_extension() -> None:
    """Let transformers find mamba-ssm's Triton scan where the package's CUDA extension was not built.

    The scan does not use the extension, but the package imports it, so an empty module takes its name. transformers
    looks for the scan once, when it loads NemotronH, so this function has to be called before.
    """
    name = "selective_scan_cuda"
    if name not in sys.modules and find_spec("mamba_ssm") is not None and find_spec(name) is None:
        sys.modules[name] = ModuleType(name)


def torch_forms_on_the_cpu(mixers: list[Any]) -> None:
    """Let Mamba blocks run on the CPU of a machine that has mamba-ssm.

    transformers chooses between kernels and torch once, by the installed packages; Triton's kernels then refuse tensors
    of the CPU. Each such function is replaced by one that chooses by the device of its first argument.
    """
    for module in {sys.modules[type(mixer).__module__] for mixer in mixers if not mixer.A_log.is_cuda}:
        for name in ("mamba2_chunk_scan", "mamba2_selective_state_update", "causal_conv1d_fn", "causal_conv1d_update"):
            function = getattr(module, name, None)
            if hasattr(function, "__wrapped__") and not hasattr(function, "chooses_by_device"):
                setattr(module, name, _chosen_by_device(function))


def _chosen_by_device(function: Any) -> Any:
    plain = inspect.unwrap(function)
    if function.__name__ == "mamba2_selective_state_update":
        plain = _quick_update(plain)

    @functools.wraps(function)
    def chosen(first: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        if first.is_cuda:
            return function(first, *arguments, **named)
        known = inspect.signature(plain).parameters
        return plain(first, *arguments, **{name: value for name, value in named.items() if name in known})

    chosen.chooses_by_device = True  # type: ignore[attr-defined]
    return chosen


def _quick_update(plain: Any) -> Any:
    """Return transformers' single step, where it is Mamba-2's with fewer passes over the state."""

    @functools.wraps(plain)
    def update(
        state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, *rest: Any, **named: Any
    ) -> Any:
        bias = named.get("dt_bias")
        expanded = dt.stride(-1) == 0 and a.stride(-1) == a.stride(-2) == 0 and (bias is None or bias.stride(-1) == 0)
        if expanded and state.dtype == torch.float32 and named.get("z") is None and len(rest) <= 3:
            return selective_state_update(state, x, dt, a, *rest, **named)
        return plain(state, x, dt, a, *rest, **named)

    return update


def scan_function(mixer: Any) -> Any:
    """The chunked-scan function that this mixer's forward calls. Raises PrecisionError where there is none."""
    module = sys.modules[type(mixer).__module__]
    function = getattr(module, "mamba2_chunk_scan", None)
    if function is None:
        raise PrecisionError(
            f"{module.__name__}: expected a `mamba2_chunk_scan` function to check, found none; "
            "this Mamba implementation is not supported"
        )
    return function


def scan_implementation(mixer: Any) -> str:
    """ "mamba-ssm <version>" or "torch": the scan that really runs, found by following the function's wrappers."""
    if not mixer.A_log.is_cuda:
        return "torch"  # `torch_forms_on_the_cpu` takes care of that
    function = scan_function(mixer)
    for _ in range(4):
        names, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
        free = dict(zip(names.co_freevars, cells or (), strict=False)) if names else {}
        if "implementation" in free:
            function = free["implementation"].cell_contents
            break
        function = getattr(function, "__wrapped__", function)
    if str(getattr(function, "__module__", "")).startswith("mamba_ssm"):
        return f"mamba-ssm {metadata.version('mamba-ssm')}"
    return "torch"


@torch.inference_mode()
def run_canary(model: Any, *, carry_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Carry a state through 16 calls of the scan that really runs and through the model's own cache class.

    `carry_dtype` rounds the carried state after each call, which shows that the canary notices it. Returns the final
    state's least and largest value and its dtype, for the manifest; the expected value is 264.
    """
    mixer = mamba_mixers(model)[0]
    scan, device = scan_function(mixer), mixer.A_log.device
    dtype = mixer.in_proj.weight.dtype
    heads, width, groups, state = mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size
    cache = DynamicCache(config=model.config)
    x = torch.ones(1, _CALL_TOKENS, heads, width, device=device, dtype=dtype)
    dt = torch.ones(1, _CALL_TOKENS, heads, device=device, dtype=torch.float32)
    added = torch.full((1, _CALL_TOKENS, groups, state), _ADDED / _CALL_TOKENS, device=device, dtype=dtype)
    carried = torch.full((1, heads, width, state), _INITIAL, device=device, dtype=torch.float32)
    for _ in range(_CALLS):
        _, final = scan(
            x,
            dt,
            torch.zeros(heads, device=device, dtype=torch.float32),
            added,
            added,
            chunk_size=mixer.chunk_size,
            initial_states=carried,
            dt_softplus=False,
            dt_limit=DT_LIMIT,
            return_final_states=True,
        )
        if carry_dtype is not None:
            final = final.to(carry_dtype)
        carried = cache.update_recurrent_state(final, layer_idx=mixer.layer_idx)
    return {
        "canary_min": float(carried.min()),
        "canary_max": float(carried.max()),
        "carry_dtype": str(carried.dtype).removeprefix("torch."),
    }


def require_canary(result: dict[str, Any]) -> None:
    """Raise PrecisionError unless the canary ended at 264 in float32."""
    expected = _INITIAL + _CALLS * _ADDED
    exact = abs(result["canary_min"] - expected) < 1e-3 and abs(result["canary_max"] - expected) < 1e-3
    if not exact or result["carry_dtype"] != "float32":
        raise PrecisionError(
            f"SSM canary: expected a float32 carry that ends at {expected}, found {result}; the state is rounded "
            "between calls, which costs the verifier accuracy on long inputs"
        )


def enforce_contract(model: Any, path: Path, *, allow_fallback: bool) -> dict[str, Any] | None:
    """Enforce and prove the contract on a model that was loaded from `path`; returns its description for the manifest.

    mamba-ssm's kernels have the same tiles in every process from then on. Returns None for a model without Mamba
    blocks. Raises PrecisionError where the contract is not met, or where a GPU would run the scan of plain torch
    without `allow_fallback`.
    """
    mixers = mamba_mixers(model)
    if not mixers:
        return None
    restored = restore_fp32_parameters(model, path)
    lift_dt_limit(mixers)
    assert_dt_limit(mixers)
    scan = scan_implementation(mixers[0])
    if scan == "torch" and mixers[0].A_log.is_cuda and not allow_fallback:
        raise PrecisionError(
            "expected mamba-ssm's scan kernels on this GPU, found the PyTorch fallback (about 15 times slower, and "
            "128 GiB of temporaries at 32k tokens); install draftcache[gpu], or pass --allow-fallback"
        )
    if scan != "torch":
        fix_scan_tiles()
    canary = run_canary(model)
    require_canary(canary)
    return {
        "dt_limit": [DT_LIMIT[0], "inf"],
        "mamba_blocks": len(mixers),
        "fp32_parameters": sorted({name.rpartition(".")[2] for name in restored}),
        "scan": scan,
        # mamba-ssm's kernel casts the states at the chunks' borders to C's dtype before the dot product.
        "snapshot_dtype": "float32" if scan == "torch" else str(mixers[0].in_proj.weight.dtype).removeprefix("torch."),
        **canary,
    }
