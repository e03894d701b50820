"""The arithmetic of a memory estimate: tensors are taken and given back, and the moment of the largest sum counts."""

from __future__ import annotations

from draftcache.draft_train.drafts.sizes import MEMORY_KINDS


class MemoryLedger:
    """The tensors that are alive, in bytes by kind and name, and a copy of that table at its peak."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], int] = {}
        self.most: dict[tuple[str, str], int] = {}

    def take(self, kind: str, name: str, size: int) -> None:
        """Allocate `size` bytes, in place of the tensor that has this kind and name already."""
        self._held[kind, name] = size
        if sum(self._held.values()) > sum(self.most.values()):
            self.most = dict(self._held)

    def give(self, kind: str, *names: str) -> None:
        for name in names:
            del self._held[kind, name]

    def working(self, **sizes: int) -> None:
        """Allocate these working tensors, one after the other."""
        for name, size in sizes.items():
            self.take("working", name, size)

    def done(self, *names: str) -> None:
        self.give("working", *names)

    def peak(self) -> dict[str, int]:
        """Return the bytes of each kind (`MEMORY_KINDS`) at the moment when their sum was largest."""
        return {kind: sum(size for (of, _), size in self.most.items() if of == kind) for kind in MEMORY_KINDS}
