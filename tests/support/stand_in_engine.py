"""A stand-in for vLLM where there is none: greedy decoding by transformers, and by draftcache's own decoding loop.

It answers the requests of `draftcache.tools.engine_check.engine` in the form of the engine-side script. The draft's
weights are those of the run beside the export; tap ids are the export's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from draftcache.capture.verifier.load import load_verifier
from draftcache.draft_train.checkpoint import load_draft, load_state, resolve_checkpoint
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.store.common.errors import WorkerError
from draftcache.store.common.files import read_json, write_json
from draftcache.store.reader import StoreReader
from draftcache.tools.decoding.loop import draft_cache

CPU = torch.device("cpu")
VERSIONS = {"engine": "stand-in 1", "torch": "0", "transformers": "0", "python": "3", "device": "cpu"}


class StandIn:
    """Counts its starts, and may be told to err."""

    def __init__(self, run: Path, store: Path) -> None:
        """`run` is the draft's, `store` the one that it was trained on, once they exist."""
        self.run, self.store = run, store
        self.starts: list[str] = []
        self.changed_text = False
        """Whether speculative decoding writes another last token than plain decoding."""
        self.broken = False
        """Whether the engine fails with a draft."""
        self.changed_proposals = False
        """Whether every chain begins with another token than the draft's."""

    def answer(self, request: Path, result: Path) -> None:
        """Answer a request as the engine-side script would."""
        asked = read_json(request)
        if self.broken:
            raise WorkerError("no room for the draft")
        self.starts.append(result.stem)
        speculative = asked["options"].get("speculative_config")
        if (form := read_json(Path(asked["model"]) / "config.json").get("speculators_config")) is not None:
            tokens = form["proposal_methods"][0]["speculative_tokens"]
            speculative = {"model": asked["model"], "num_speculative_tokens": tokens}
            asked["model"] = form["verifier"]["name_or_path"]
        texts = [self._plain(asked["model"], prompt, asked["max_tokens"]) for prompt in asked["prompts"]]
        body: dict[str, Any] = {"versions": VERSIONS, "hook": None, "counters": {}, "seconds": {"start": 0, "work": 0}}
        chains: list[Any] = [None] * len(texts)
        if speculative is not None:
            chains = self._chains(asked, texts, speculative)
            body |= {"hook": "stand-in", "counters": {"vllm:spec_decode_num_drafts": sum(map(len, chains))}}
            if self.changed_text:
                texts[0][-1] ^= 1
        body["outputs"] = [
            {"token_ids": text, "hidden_states": None, "proposals": chain}
            for text, chain in zip(texts, chains, strict=True)
        ]
        write_json(result, body)

    @torch.inference_mode()
    def _plain(self, model: str, prompt: list[int], count: int) -> list[int]:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokens = torch.tensor([prompt])
        found = loaded.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count, min_new_tokens=count,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return [int(token) for token in found[0, len(prompt) :]]

    @torch.inference_mode()
    def _chains(self, asked: dict[str, Any], texts: list[list[int]], speculative: dict[str, Any]) -> list[Any]:
        """Return the proposals of each prompt's verify steps, on taps by the export's ids."""
        verifier = load_verifier(Path(asked["model"]), device=CPU, dtype=torch.float32, trust_remote_code=False)
        config, checkpoint = read_json(Path(speculative["model"]) / "config.json"), resolve_checkpoint(self.run)
        layers = tuple(number - 1 for number in config["eagle_aux_hidden_state_layer_ids"])
        draft, store = load_draft(checkpoint, load_state(checkpoint), CPU), StoreReader(self.store)
        embeddings, targets = (
            FrozenWeights.load(store, CPU).embed_tokens,
            torch.from_numpy(store.vocab_map().target_ids),
        )
        count, found = speculative["num_speculative_tokens"], []
        for prompt, text in zip(asked["prompts"], texts, strict=True):
            states = verifier.forward(torch.tensor([*prompt, *text]), layers)
            taps = torch.cat([states.taps[layer].float() for layer in layers], dim=-1)
            cache, chains, produced = draft_cache(draft, embeddings), [], 1
            while produced < len(text):
                known = [*prompt, *text[:produced]]
                chain = [choice.token for choice in cache.propose(taps, known, targets, count)]
                chain[0] ^= int(self.changed_proposals)
                chains.append(chain)
                pairs = zip(chain, text[produced:], strict=False)
                produced += 1 + next((at for at, (one, other) in enumerate(pairs) if one != other), len(chain))
            found.append(chains)
        return found
