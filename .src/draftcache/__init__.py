"""Train draft models for speculative decoding from stored verifier outputs.

This folder is how the repository's top-level folders become one importable package: `draftcache.capture`,
`draftcache.store`, `draftcache.draft_train` and `draftcache.tools` are links to them.
"""

__version__ = "0.1.0"
