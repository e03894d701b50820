"""Places in this repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository: where commands such as `python -m draftcache.tools.cli` are started."""
DEMO = ROOT / "tools" / "demo" / "assets" / "verifier"
"""The directory of the demo's trained verifier, a NemotronH of 12 blocks."""
