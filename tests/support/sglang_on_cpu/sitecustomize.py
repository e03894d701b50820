"""Lets SGLang 0.5.12 decode speculatively on a CPU, with this directory in PYTHONPATH: Python imports it at its start.

SGLang takes two kernels of speculative decoding from the package sgl_kernel, which exists for GPUs only; the package
beside this file has them in torch. Empty packages stand for those that a server of texts imports and never calls. Its
Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

_EMPTY = ("torchvision", "sgl_kernel")
_EAGLE = "sglang.srt.speculative.eagle_utils"


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


class _KernelsInTorch(importlib.abc.MetaPathFinder):
    """Gives SGLang's module of draft chains the kernels that it takes on a GPU, once it has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _EAGLE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_patch(module: Any) -> None:
            from sgl_kernel import build_tree_kernel_efficient

            run(module)
            module._is_cuda, module.sgl_build_tree_kernel_efficient = True, build_tree_kernel_efficient

        spec.loader.exec_module = run_and_patch  # type: ignore[method-assign]
        return spec


sys.meta_path.append(_Finder())
sys.meta_path.insert(0, _KernelsInTorch())
