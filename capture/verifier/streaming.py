"""Loading weights straight to a GPU: each tensor goes there from the memory-mapped files as soon as it is read.

No process holds the model in its own host memory. Workers of one node map the same files, so all of them share the one
copy that the page cache holds, and a disk is read once. transformers loads so with `device_map`, for which it needs
accelerate.

What no file holds, such as the frequencies of rotary embeddings, would then be computed on the GPU, whose powers and
sines round differently. It is made in host memory, as without `device_map`, and moved: all values are bit for bit those
of a model that was loaded in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

_MAKES_THE_REST = "_move_missing_keys_from_meta_to_device"
"""The method of transformers that makes room for what no file holds; 5.17 and 5.24 have it. It takes the device map as
its second argument, and fills host memory where that is None."""


def can_stream(device: torch.device) -> bool:
    """Return whether weights can be loaded straight to this device.

    They go through host memory on a CPU, without accelerate, and where transformers has another way to make the rest.
    """
    return device.type == "cuda" and find_spec("accelerate") is not None and hasattr(PreTrainedModel, _MAKES_THE_REST)


@contextmanager
def streaming(device: torch.device) -> Iterator[None]:
    """Surround `from_pretrained` with a `device_map` to `device` by this; what no file holds is then in host memory.

    Raises torch.OutOfMemoryError where the GPU's memory ends, which transformers reports as a failed conversion.
    """
    makes_the_rest = getattr(PreTrainedModel, _MAKES_THE_REST)

    def in_host_memory(self: Any, missing: Any, _device_map: Any, *rest: Any, **named: Any) -> None:
        makes_the_rest(self, missing, None, *rest, **named)

    before = _out_of_memory_errors(device)
    setattr(PreTrainedModel, _MAKES_THE_REST, in_host_memory)
    try:
        yield
    except RuntimeError as exc:
        if not isinstance(exc, torch.OutOfMemoryError) and _out_of_memory_errors(device) > before:
            raise torch.OutOfMemoryError(f"{device}: out of memory while the weights were loaded to it") from exc
        raise
    finally:
        setattr(PreTrainedModel, _MAKES_THE_REST, makes_the_rest)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of experts that were stacked on the device, beside the stacks


def _out_of_memory_errors(device: torch.device) -> int:
    """Return how often PyTorch found the device's memory at its end in this process; 0 for a CPU."""
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0)) if device.type == "cuda" else 0
