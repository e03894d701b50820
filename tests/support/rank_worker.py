"""One rank of a training run under torchrun's variables, which also writes down the weights that it ends with."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.ranks import Ranks, joined_ranks
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import DraftcacheError


@contextmanager
def shared_gpu(name: str) -> Iterator[Ranks]:
    """Join ranks that share one GPU, which `joined_ranks` refuses."""
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo")
    yield Ranks(torch.device(name), int(os.environ["RANK"]), world)


def main() -> None:
    """Run `rank_worker.py SETTINGS [BREAK]`: TrainConfig as JSON, and the rank whose fc becomes infinite."""
    values = json.loads(sys.argv[1])
    config = TrainConfig(**values | {"store": values["store"], "output": Path(values["output"])})
    with shared_gpu(config.device) if config.device == "cuda:0" else joined_ranks(config.device) as ranks:
        trainer = Trainer(config, ranks)
        if sys.argv[2:] == [str(ranks.rank)]:
            restore = trainer._restore

            def restore_and_break() -> None:
                restore()
                with torch.no_grad():
                    trainer.model.fc.weight.fill_(torch.inf)

            trainer._restore = restore_and_break  # type: ignore[method-assign]
        try:
            trainer.run()
        finally:
            weights = trainer.model.state_dict()
            save_file(weights, config.output.with_name(f"{config.output.name}-{ranks.rank}.safetensors"))


if __name__ == "__main__":
    code = 0
    try:
        main()
    except DraftcacheError:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)  # as the command does: threads of torch's process group may abort at the interpreter's end
