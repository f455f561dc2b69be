"""The process groups of one layout: the only place that touches megatron-core's parallel state.

Ranks are laid out by megatron-core's order "tp-cp-ep-dp-pp": tensor ranks are neighbours.
"""

import datetime
import os

import torch
import torch.distributed
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.engine.platform import PLATFORM

# Longer than any first save or data preparation that one rank does while the others wait.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


class PortTakenError(RuntimeError):
    """Another process listens on the port at which the ranks were to meet."""


def join_world(
    *, rank: int | None = None, size: int | None = None, init_method: str = "env://"
) -> None:
    """Join torch.distributed as one rank, on this machine's backend.

    Args:
        rank, size: this rank and how many there are; from RANK and WORLD_SIZE when None.
        init_method: how ranks find each other, as torch.distributed takes it.

    Raises:
        PortTakenError: rank 0 cannot listen where the ranks are to meet.
        ValueError: this machine has fewer GPUs than ranks.
    """
    if PLATFORM.device_type == "cuda":
        torch.cuda.set_device(_own_gpu())
    try:
        torch.distributed.init_process_group(
            backend=PLATFORM.backend,
            init_method=init_method,
            rank=int(os.environ.get("RANK", "0")) if rank is None else rank,
            world_size=int(os.environ.get("WORLD_SIZE", "1")) if size is None else size,
            timeout=COLLECTIVE_TIMEOUT,
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise PortTakenError(
            f"port {os.environ.get('MASTER_PORT')} of {os.environ.get('MASTER_ADDR')} is taken by "
            "another process, so the ranks cannot meet there; start again (`mvl resume RUN` takes "
            "another port), or set MASTER_PORT where you start ranks by hand"
        ) from error


def _own_gpu() -> int:
    """This rank's GPU, of those it sees; Slurm may show each rank its own alone."""
    place, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= gpus and "SLURM_PROCID" not in os.environ:
        raise ValueError(
            f"rank {place} of this machine has no GPU: there are {gpus}, and NCCL takes one for "
            f"each rank; nearest valid: a layout of {gpus} ranks here (parallel.data={gpus} with "
            "the other axes at 1), or CUDA_VISIBLE_DEVICES= (empty), which trains on the CPU"
        )
    return place % gpus


def create(parallel: ParallelConfig, seed: int) -> ProcessGroupCollection:
    """Split the joined world into the groups of `parallel`.

    Raises:
        ValueError: the world has another number of ranks than the layout.
    """
    joined = torch.distributed.get_world_size()
    if joined != parallel.ranks:
        raise ValueError(
            f"parallel asks for {parallel.ranks} ranks (tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} x context {parallel.context} x data {parallel.data}), "
            f"{joined} joined; start {parallel.ranks} ranks, or set parallel so that the "
            f"product is {joined}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        create_gloo_process_groups=False,
    )
    # Weights are drawn by `model.initialize`, independent of the layout; this seed only serves
    # the RNG tracker that megatron-core's constructors insist on.
    model_parallel_cuda_manual_seed(seed)
    return ProcessGroupCollection.use_mpu_process_groups()


def destroy() -> None:
    """Forget the layout, keep the world: another `create` may follow."""
    parallel_state.destroy_model_parallel()


def leave_world() -> None:
    """Leave torch.distributed, layout included."""
    destroy()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
