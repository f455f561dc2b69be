"""The rate of an all-reduce, measured by all ranks of a process group that stands; and its result.

torch is imported when it is called: `launch` runs on login nodes. Costs a few reductions of 64 MB.
"""

import time

MEGABYTES = 64
_ROUNDS = 5


def measure_all_reduce(device: str) -> float:
    """The best of a few rounds, in GB of the tensor a second.

    Args:
        device: where this rank's tensor lies.

    Raises:
        RuntimeError: the sum is wrong in some round.
    """
    import torch
    import torch.distributed

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    values = torch.empty(MEGABYTES * 250_000, device=device)
    expected = float(size + size // 2)  # exact in float32 for any number of ranks
    best = 0.0
    for _ in range(_ROUNDS):
        values.fill_(1.0 + rank % 2)
        torch.distributed.barrier()
        begun = time.perf_counter()
        torch.distributed.all_reduce(values)
        ends = (float(values[0]), float(values[-1]))  # waits for a GPU too
        best = max(best, MEGABYTES / 1e3 / (time.perf_counter() - begun))
        if ends != (expected, expected):
            raise RuntimeError(
                f"an all-reduce of ones and twos over {size} ranks gave {ends[0]} and {ends[1]}, "
                f"not {expected}"
            )
    return best
