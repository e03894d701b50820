"""The final norm measured through its module: what it is, its effective weight, its epsilon."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.verifier.load import Verifier, describe_verifier, load_verifier
from draftcache.capture.verifier.norm import measure_norm
from draftcache.capture.verifier.self_check import TOKENS, self_check
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader
from support.capture_jobs import config, small_dataset
from support.scaled_models import save_scaled
from support.tiny_models import VOCAB
from support.training_runs import config as training

CPU = torch.device("cpu")
IDS = torch.randint(3, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))
NOTHING = SimpleNamespace()


class Rms(nn.Module):
    """An RMS norm whose epsilon has any name, and whose weight is w plus `added`."""

    def __init__(self, size: int, eps: float = 1e-6, added: float = 0.0, name: str = "eps", power: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size, generator=torch.Generator().manual_seed(2)) + 0.2)
        self.added, self.name, self.power = added, name, power
        setattr(self, name, eps)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        mean = hidden.float().abs().pow(self.power).mean(-1, keepdim=True).pow(2 / self.power)
        return (hidden.float() * torch.rsqrt(mean + getattr(self, self.name)) * (self.weight + self.added)).to(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("added", [0.0, 1.0, 0.5])
@pytest.mark.parametrize(("eps", "name"), [(1e-5, "variance_epsilon"), (1e-6, "eps"), (1e-8, "mine"), (1e-3, "mine")])
def test_the_effective_weight_is_read(dtype: torch.dtype, size: int, added: float, eps: float, name: str) -> None:
    norm = Rms(size, eps, added, name).to(dtype)
    found = measure_norm(norm, NOTHING, size)
    assert found.kind == "rms_norm"
    assert found.weight.dtype == torch.float32
    torch.testing.assert_close(found.weight, norm.weight.float() + added, rtol=1e-5, atol=1e-6)
    if added in (0.0, 1.0):  # without the rounding of measuring
        assert torch.equal(found.weight, norm.weight.float() + added)
    assert found.eps == pytest.approx(eps, rel=0.02 if eps < 1e-7 else 2e-3)
    if name != "mine":
        assert found.eps == eps


def test_a_norm_of_another_formula_is_called_other() -> None:
    assert measure_norm(Rms(32, power=4), NOTHING, 32).kind == "other"
    assert measure_norm(nn.Sequential(Rms(32), nn.Tanh()), NOTHING, 32).kind == "other"


def test_a_layer_norm_is_one_with_and_without_bias() -> None:
    for bias in (True, False):
        norm = nn.LayerNorm(32, bias=bias)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(torch.rand(32))
        found = measure_norm(norm.to(torch.bfloat16), NOTHING, 32)
        assert (found.kind, found.eps) == ("layer_norm", 1e-5)
        assert torch.equal(found.weight, norm.weight.float())


def load(path: Path, dtype: torch.dtype = torch.float32) -> Verifier:
    return load_verifier(path, device=CPU, dtype=dtype, trust_remote_code=False)


@pytest.mark.parametrize(
    ("kind", "norm", "added"),
    [
        ("llama", None, 0), ("gemma2", None, 1), ("nanochat", None, None),
        ("olmo", "layer_norm", None), ("cohere", "layer_norm", 0), ("stablelm", "layer_norm", 0),
        ("phi", "layer_norm", 0), ("opt", "layer_norm", 0),
    ],
)  # fmt: skip
def test_verifiers_norms_are_described(tmp_path: Path, kind: str, norm: str | None, added: int | None) -> None:
    """A weight that the module does not have (OLMo 1, nanochat) is one of ones."""
    path = save_scaled(tmp_path, kind)
    for dtype in (torch.float32, torch.bfloat16):
        verifier = load(path, dtype)
        described = describe_verifier(path, verifier)
        assert described.get("final_norm") == norm
        stored = getattr(verifier.final_norm, "weight", None)
        assert (stored is None) == (added is None)
        expected = torch.ones(32) if stored is None else stored.float() + added
        assert torch.equal(verifier.norm.weight, expected)
        names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
        eps = next((value for name in names if (value := getattr(verifier.model.config, name, None))), 1e-5)
        assert described["rms_norm_eps"] == eps
        self_check(verifier, (1,), IDS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"), tokenizer_dir)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_draft_starts_from_the_effective_weight_in_full_precision(dataset: Path, tmp_path: Path) -> None:
    path = save_scaled(tmp_path / "verifier", "gemma2")
    job = CaptureJob(config(path, dataset, tmp_path / "store", compute_dtype="bfloat16", splits=("train",)))
    job.run()
    weight = 1 + job.verifier.final_norm.weight.float()  # type: ignore[operator]
    assert not torch.equal(weight.bfloat16().float(), weight)
    stored = load_file(StoreReader(tmp_path / "store").files.frozen)
    assert torch.equal(stored["norm"], weight)
    assert stored["lm_head"].dtype == torch.bfloat16
    trainer = Trainer(training(tmp_path, head_dim=8))
    assert torch.equal(trainer.model.norm.weight, weight)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_layer_norm_cannot_start_a_drafts_norm(dataset: Path, tmp_path: Path) -> None:
    path = save_scaled(tmp_path / "verifier", "olmo")
    CaptureJob(config(path, dataset, tmp_path / "store", splits=("train",))).run()
    assert StoreReader(tmp_path / "store").manifest.verifier["final_norm"] == "layer_norm"
    with pytest.raises(InputError, match=r"RMS norm.*found 'layer_norm'.*use --head-init random"):
        Trainer(training(tmp_path, head_dim=8))
    Trainer(training(tmp_path, head_dim=8, head_init="random", epochs=1)).run()
