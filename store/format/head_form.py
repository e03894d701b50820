"""What a verifier does to the product of its head and its final states before it calls the result logits.

`logits = cap * tanh(scale * (W h + b) / cap)`, or `scale * (W h + b)` without a cap, with the final norm's output h,
the head's matrix W and its bias b. Most verifiers have neither scale nor cap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftcache.store.common.errors import StoreError


@dataclass(frozen=True)
class HeadForm:
    """Scale and cap of a verifier's logits. Raises StoreError for values that are not finite and above 0."""

    scale: float = 1.0
    """Factor of the head's output."""
    cap: float | None = None
    """Bound that logits approach and never exceed; None where nothing bounds them."""

    def __post_init__(self) -> None:
        for name, value in (("logit_scale", self.scale), ("logit_cap", 1.0 if self.cap is None else self.cap)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise StoreError(f"verifier: expected {name} to be a finite number above 0, found {value!r}")

    @classmethod
    def of(cls, verifier: Mapping[str, Any]) -> HeadForm:
        """Return the form that a manifest's description of the verifier names; what is absent changes nothing."""
        return cls(verifier.get("logit_scale", 1.0), verifier.get("logit_cap"))

    @property
    def is_identity(self) -> bool:
        """Whether logits are the head's output as it is."""
        return self.scale == 1.0 and self.cap is None

    def to_json(self) -> dict[str, float]:
        """Return `logit_scale` and `logit_cap` for the manifest, without those that change nothing."""
        scale = {} if self.scale == 1.0 else {"logit_scale": self.scale}
        return scale if self.cap is None else scale | {"logit_cap": self.cap}

    def __str__(self) -> str:
        return f"scale {self.scale:g}, " + ("no cap" if self.cap is None else f"cap {self.cap:g}")


IDENTITY = HeadForm()
"""Logits are the head's output."""
