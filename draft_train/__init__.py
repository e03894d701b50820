"""Trains, evaluates and exports Eagle3 drafts from stores. It never imports the verifier or `draftcache.capture`."""
