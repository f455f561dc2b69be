"""A world of one rank inside the test process."""

import contextlib
import tempfile
from collections.abc import Iterator

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.engine import process_groups


@contextlib.contextmanager
def one_rank() -> Iterator[ProcessGroupCollection]:
    """Join a world of one and give its process groups."""
    with tempfile.TemporaryDirectory() as folder:
        process_groups.join_world(rank=0, size=1, init_method=f"file://{folder}/world")
        try:
            yield process_groups.create(ParallelConfig(), seed=0)
        finally:
            process_groups.leave_world()
