"""Trains, evaluates and exports Eagle3 drafts from stores. Never imports the verifier or `capture`."""
