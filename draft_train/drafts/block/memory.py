"""placeholder"""

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.drafts.protocol import BatchRows


def peak_bytes(shape: BlockShape, config: TrainConfig, batch: BatchRows) -> dict[str, int]:
    return {}
