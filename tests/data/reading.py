"""Reading packs as all data-parallel ranks together do, and telling packs apart."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.cost_order import deal
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.pack import Pack


def next_global_batch(loaders: Sequence[PackLoader]) -> list[Pack]:
    """The next global batch in the order of its packs, from one loader a rank."""
    shares = [loader.next_batch() for loader in loaders]
    size, batch = len(loaders), sum(len(share) for share in shares)
    found: dict[int, Pack] = {}
    for rank, share in enumerate(shares):
        found.update(zip(deal(batch, rank, size), share, strict=True))
    return [found[place] for place in range(batch)]


def read(
    config: StageConfig, batches: int, *, size: int = 1, cursor: int = 0, split: str = "train"
) -> list[Pack]:
    """Packs in global order."""
    loaders = [
        PackLoader(config, split=split, rank=rank, size=size, cursor=cursor) for rank in range(size)
    ]
    try:
        packs = [pack for _ in range(batches) for pack in next_global_batch(loaders)]
        after = cursor + batches * config.train.global_batch
        assert {loader.cursor for loader in loaders} == {after}
    finally:
        for loader in loaders:
            loader.close()
    return packs


def same(one: Pack, two: Pack) -> bool:
    """Whether two packs are equal in every bit."""
    return fingerprint(one) == fingerprint(two)


def fingerprint(pack: Pack) -> str:
    """Digest of everything in a pack."""
    digest = hashlib.sha256()
    for name, value in sorted(vars(pack).items()):
        digest.update(name.encode())
        if isinstance(value, torch.Tensor):
            array = np.ascontiguousarray(value.numpy())
            digest.update(repr((array.dtype, array.shape)).encode())
            digest.update(array.tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
