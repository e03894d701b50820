"""A KV connector for a vLLM on a CPU, which imports this file by itself: its own one for hidden states needs a GPU.

By vLLM 0.32: ExampleHiddenStatesConnector copies to pinned memory, and asks an event of CUDA whether the copy is done.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import ExampleHiddenStatesConnector


class ExtractsOnCpu(ExampleHiddenStatesConnector):  # type: ignore[misc]
    """The connector, once memory need not be pinned and events are done at once."""

    def register_kv_caches(self, kv_caches: Any) -> None:
        """Called once in the worker, before its first request."""
        super().register_kv_caches(kv_caches)
        empty_like: Any = torch.empty_like
        torch.empty_like = lambda like, pin_memory=False, **named: empty_like(like, **named)
        torch.cuda.Event.query = lambda _event: True  # type: ignore[method-assign]
