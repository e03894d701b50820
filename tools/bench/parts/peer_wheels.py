"""Import other projects' trainer modules from their wheels, without dependencies that the trainers do not need."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch

from draftcache.store.common.errors import InputError

WHEELS = {"specforge": "specforge", "automodel": "nemo_automodel", "speculators": "speculators"}
"""By project, the beginning of its wheel's name."""
_AUTOMODEL = "nemo_automodel.components"
_BARE = ("speculative", "speculative.eagle", "speculative.dspark", "datasets", "datasets.llm")


@contextmanager
def unpacked_wheels(directory: Path, projects: Iterable[str] = tuple(WHEELS)) -> Iterator[Path]:
    """Unpack the wheels of these projects and make them importable until the context ends; yields the directory.

    The files must last as long, because the projects import lazily and triton reads kernels' sources. Raises InputError
    unless `directory` holds exactly one wheel of each project.
    """
    with TemporaryDirectory() as root:
        for name in (WHEELS[project] for project in projects):
            found = sorted(directory.glob(f"{name}-*.whl"))
            if len(found) != 1:
                raise InputError(f"{directory}: expected one wheel {name}-*.whl, found {len(found)}")
            print(f"{found[0].stem}", flush=True)
            with zipfile.ZipFile(found[0]) as archive:
                archive.extractall(root)
        sys.path.insert(0, root)
        try:
            yield Path(root)
        finally:
            sys.path.remove(root)


def automodel_modules() -> tuple[ModuleType, ModuleType]:
    """Import Automodel's Eagle3 draft and trainer core, with torch's FlashAttention in the place of flash-attn's."""
    draft, core = (automodel_module(f"speculative.eagle.{name}") for name in ("draft_llama", "core"))
    vars(draft).update(_HAS_FA=True, _flash_attn_func=flash_attention, _flash_attn_varlen_func=flash_attention_varlen)
    return draft, core


def automodel_module(name: str) -> ModuleType:
    """Import a module of Automodel's components, such as `speculative.eagle.core`.

    The packages around it are replaced by empty ones, because their `__init__` imports every recipe's dependencies.
    """
    root = Path(next(folder for folder in sys.path if (Path(folder) / "nemo_automodel").is_dir()))
    for package in (f"{_AUTOMODEL}.{bare}" for bare in _BARE):
        if package not in sys.modules:
            module = ModuleType(package)
            module.__path__ = [str(root.joinpath(*package.split(".")))]
            sys.modules[package] = module
    lacks_datasets = importlib.util.find_spec("datasets") is None
    if lacks_datasets:  # the modules name it in annotations only
        module = ModuleType("datasets")
        module.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
        module.Dataset = module.DatasetDict = object  # type: ignore[attr-defined]
        sys.modules["datasets"] = module
    try:
        return importlib.import_module(f"{_AUTOMODEL}.{name}")
    finally:
        if lacks_datasets:
            del sys.modules["datasets"]


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    return_attn_probs: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Compute flash-attn's `flash_attn_func` by torch's copy of its kernels, or on a CPU by plain products.

    Inputs are [B, T, N, D] bf16. Returns the output [B, T, N, D], the LSE [B, N, T] and None. As in flash-attn, the LSE
    carries no gradient.
    """
    if query.is_cuda:
        found = torch.ops.aten._flash_attention_forward(
            query, key, value, None, None, query.shape[1], key.shape[1], 0.0, causal, False, scale=softmax_scale
        )
        return found[0], found[1], None
    scores = torch.einsum("btnd,bsnd->bnts", query.float(), key.float()) * softmax_scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    output = torch.einsum("bnts,bsnd->btnd", torch.softmax(scores, dim=-1), value.float())
    return output.to(query.dtype), torch.logsumexp(scores, dim=-1).detach(), None


def flash_attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    return_attn_probs: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Compute flash-attn's `flash_attn_varlen_func` in the same way: [T, N, D] -> output [T, N, D], LSE [N, T]."""
    if query.is_cuda:
        found = torch.ops.aten._flash_attention_forward(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False,
            scale=softmax_scale,
        )  # fmt: skip
        return found[0], found[1], None
    outputs, lses = [], []
    for first, last in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        part = (tensor[None, first:last] for tensor in (query, key, value))
        output, lse, _ = flash_attention(*part, softmax_scale=softmax_scale, causal=causal)
        outputs.append(output[0])
        lses.append(lse[0])
    return torch.cat(outputs), torch.cat(lses, dim=-1), None
