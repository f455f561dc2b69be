"""Builds one rank of any layout on one machine: the meta device and a world of one process.

Nothing is allocated and nothing is sent, so the 12B model at TP8 x PP4 is counted on a laptop in
well under a second.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.engine import process_groups


@contextlib.contextmanager
def meta_device() -> Iterator[None]:
    """Put what megatron-core allocates "on the current device" on the meta device.

    Its optimizer asks tensors for their type by name and takes CUDA's alone: meta tensors say so.
    """
    current_device, plain_type = torch.cuda.current_device, torch.Tensor.type

    def type_without_meta(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = plain_type(self, *args, **kwargs)
        if self.is_meta and isinstance(name, str):
            return f"torch.cuda.{name.rpartition('.')[2]}"
        return name

    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]
    torch.Tensor.type = type_without_meta  # type: ignore[method-assign,assignment]
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.cuda.current_device = current_device
        torch.Tensor.type = plain_type  # type: ignore[method-assign]


@contextlib.contextmanager
def pretend_rank(parallel: ParallelConfig, rank: int = 0) -> Iterator[ProcessGroupCollection]:
    """Be one rank of a layout without the others: groups that have sizes and send nothing.

    Raises:
        RuntimeError: this process has joined a real world already.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("pretend_rank needs a process that has not joined torch.distributed")
    torch.distributed.init_process_group(
        backend="fake",
        rank=rank,
        world_size=parallel.ranks,
        store=FakeStore(),
    )
    try:
        yield process_groups.create(parallel, seed=0)
    finally:
        process_groups.leave_world()
