"""The settings of one generate job. This module imports neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.rows.roles import RoleMap
from draftcache.store.common.errors import InputError
from draftcache.store.common.settings import require_finite

CONTINUATIONS = ("last-user", "first-user", "each-user")
RESERVED_SPLITS = ("manifest.json", "quarantine")
"""Names in the output that are no splits."""
_SERVER_ONLY = {"model": None, "chat": False}
_DTYPES = ("auto", "bfloat16", "float32")


def _doc(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Which prompts to answer, with which model and how. Raises InputError for a value out of range."""

    output: Path = field(metadata=_doc("folder to write; the same command goes on with what an earlier run left"))
    splits: dict[str, list[Path]]
    """Files with prompts by the name of their split. On the command line: NAME=INPUT."""
    tokenizer: Path | None = field(
        default=None, metadata=_doc("the verifier's tokenizer and chat template (default: the --verifier)")
    )
    server: str | None = field(
        default=None,
        metadata=_doc("an OpenAI-compatible server (vLLM, SGLang), such as http://host:8000/v1, that runs the model"),
    )
    model: str | None = field(
        default=None, metadata=_doc("the model's name on the server (default: the only one that it serves)")
    )
    chat: bool = field(
        default=False,
        metadata=_doc("send messages to /chat/completions, for servers that take no token ids at /completions"),
    )
    verifier: Path | None = field(
        default=None, metadata=_doc("model directory to run in this process with transformers, instead of a server")
    )
    continue_from: str = field(
        default="last-user",
        metadata=_doc(
            "what of a conversation is the prompt: last-user (all up to its last user or tool message), first-user "
            "(all up to the first), or each-user (a prompt for each)"
        ),
    )
    max_new_tokens: int = field(default=4096, metadata=_doc("tokens of an answer at most"))
    temperature: float = field(default=0.0, metadata=_doc("temperature of sampling; 0 is greedy"))
    top_p: float = field(default=1.0, metadata=_doc("sample from the likeliest tokens with this much probability"))
    top_k: int = field(default=0, metadata=_doc("sample from this many likeliest tokens; 0: from all"))
    seed: int = field(default=0, metadata=_doc("each sample's own seed is derived from this one and its prompt"))
    samples: int = field(default=1, metadata=_doc("answers per prompt, each a row of its own"))
    drop_truncated: bool = field(
        default=False, metadata=_doc("leave out the answers that --max-new-tokens cut off; they are counted")
    )
    concurrency: int = field(default=64, metadata=_doc("requests that the server has at once"))
    retries: int = field(
        default=8, metadata=_doc("times that a request is sent again, after growing waits, before the job ends")
    )
    timeout_seconds: float = field(default=1800.0, metadata=_doc("longest time that one answer of the server may take"))
    batch_size: int = field(default=16, metadata=_doc("prompts that the --verifier answers side by side"))
    compute_dtype: str = field(
        default="auto", metadata=_doc("--verifier's weights: bfloat16, float32, or auto (bfloat16 on a GPU)")
    )
    device: str = field(default="auto", metadata=_doc("of the --verifier: cuda, cuda:N, cpu, or auto"))
    allow_fallback: bool = field(
        default=False, metadata=_doc("on a GPU, run Mamba blocks without mamba-ssm's kernels (about 15 times slower)")
    )
    chat_template: Path | None = field(
        default=None,
        metadata=_doc("Jinja template (default: the tokenizer's own); its text must equal the own one's on every row"),
    )
    rendering: ChatSettings = field(default_factory=ChatSettings)
    """Template arguments, today's date and a system message, as prepare has them; its other fields are not read."""
    roles: tuple[str, ...] = ()
    """NAME=ROLE, names of roles beside the built-in ones."""
    trust_remote_code: bool = field(
        default=False, metadata=_doc("run the code that the tokenizer or the verifier brings along")
    )
    overwrite: bool = field(
        default=False, metadata=_doc("replace what another job made, or left unfinished, at --output")
    )
    progress: bool = True

    def __post_init__(self) -> None:
        require_finite(self)
        RoleMap.with_names(self.roles)
        if not self.splits:
            raise InputError("generate: expected at least one NAME=INPUT, found none")
        if reserved := sorted(set(self.splits) & set(RESERVED_SPLITS)):
            raise InputError(f"generate: expected other names of splits than {reserved}, which the output has itself")
        self._check_model()
        self._check_ranges()

    def _check_model(self) -> None:
        if (self.server is None) == (self.verifier is None):
            found = "neither" if self.server is None else "both"
            raise InputError(f"generate: expected --server URL or --verifier DIR, found {found}")
        if self.server is None:
            for name, default in _SERVER_ONLY.items():
                if getattr(self, name) != default:
                    raise InputError(f"--{name}: expected a --server beside it, found --verifier")
            return
        address = urlsplit(self.server)
        if address.scheme not in ("http", "https") or not address.hostname or address.username:
            raise InputError(f"--server: expected a URL such as http://host:8000/v1, found {self.server!r}")
        if self.tokenizer is None:
            raise InputError("--tokenizer: expected the directory of the served model's tokenizer, found none")

    def _check_ranges(self) -> None:
        for name, allowed in (("continue_from", CONTINUATIONS), ("compute_dtype", _DTYPES)):
            if getattr(self, name) not in allowed:
                raise InputError(f"{_flag(name)}: expected one of {', '.join(allowed)}, found {getattr(self, name)!r}")
        for name, least in (
            *((name, 1) for name in ("max_new_tokens", "samples", "concurrency", "batch_size")),
            *((name, 0) for name in ("temperature", "top_k", "seed", "retries")),
        ):
            if getattr(self, name) < least:
                raise InputError(f"{_flag(name)}: expected at least {least}, found {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p: expected more than 0 and at most 1, found {self.top_p}")
        if self.timeout_seconds <= 0:
            raise InputError(f"--timeout-seconds: expected more than 0, found {self.timeout_seconds}")
        if self.temperature == 0 and self.samples > 1:
            raise InputError(f"--samples: expected 1 at --temperature 0, where all are the same, found {self.samples}")

    @property
    def tokenizer_directory(self) -> Path:
        """Where tokenizer and chat template are."""
        found = self.tokenizer or self.verifier
        assert found is not None, "checked in __post_init__"
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        """What decides how tokens are drawn. At temperature 0 nothing but the length does."""
        greedy = self.temperature == 0
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": 1.0 if greedy else self.top_p,
            "top_k": 0 if greedy else self.top_k,
            "seed": 0 if greedy else self.seed,
        }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
