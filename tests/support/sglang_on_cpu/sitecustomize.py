"""Lets SGLang decode speculatively on a CPU, with this directory in PYTHONPATH: Python imports it at its start.

SGLang takes kernels of speculative decoding from the package sgl_kernel, which exists for GPUs only. 0.5.12 has two of
them nowhere else: the package beside this file has these in torch. 0.5.23 has all of them in Triton too, for another
kind of device. Triton's kernels run in its interpreter. Empty packages stand for those that a server of texts imports
and never calls.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

_EMPTY = ("torchvision", "sgl_kernel")


class _Anything:
    """What an empty package has under every name."""

    def __init__(self, *values: Any, **named: Any) -> None:
        pass

    def __call__(self, *values: Any, **named: Any) -> Any:
        return values[0] if values and callable(values[0]) else self  # as a decorator it changes nothing

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the empty packages where there are no others."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        wanted = name.partition(".")[0] in _EMPTY
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)

        def attribute(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Anything()

        module.__dict__.update(__path__=[], __version__="0.0", __getattr__=attribute)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Patched(importlib.abc.MetaPathFinder):
    """Gives SGLang's modules the kernels that they take elsewhere than on a CPU, once they have been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_patch(module: Any) -> None:
            run(module)
            _PATCHES[name](module)

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


def _triton_kernels(module: Any) -> None:
    module._is_cpu, module._is_xpu = False, True  # XPUs have all of these kernels in Triton


def _draft_chains(module: Any) -> None:
    if hasattr(module, "build_tree_kernel_efficient_func"):  # 0.5.23, whose kernels are looked up elsewhere
        module._is_cpu = False
        return
    from sgl_kernel import build_tree_kernel_efficient

    module._is_cuda, module.sgl_build_tree_kernel_efficient = True, build_tree_kernel_efficient


class _AnyAlgorithm:
    """A platform that refuses no speculative algorithm; on CPUs SGLang refuses DFlash otherwise."""

    def __getattr__(self, name: str) -> Any:
        return lambda *values: True


def _every_algorithm(module: Any) -> None:
    module.current_platform = _AnyAlgorithm()


def _every_rope(module: Any) -> None:
    module.get_rope_cpu = lambda *values: module.get_rope(*values[:8])  # all but the device; its own has YaRN alone


_PATCHES = {
    "sglang.srt.layers.rotary_embedding.factory": _every_rope,
    "sglang.srt.arg_groups.speculative_hook": _every_algorithm,
    "sglang.srt.speculative.eagle_utils": _draft_chains,
    "sglang.srt.mem_cache.allocation": _triton_kernels,
    "sglang.kernels.ops.kvcache.cache_move": _triton_kernels,
    "sglang.kernels.ops.speculative.cache_locs": _triton_kernels,
    "sglang.kernels.ops.speculative.eagle": _triton_kernels,
    "sglang.kernels.ops.speculative.spec_tree": _triton_kernels,
}
sys.meta_path.append(_Finder())
sys.meta_path.insert(0, _Patched())
