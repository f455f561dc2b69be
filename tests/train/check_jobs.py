"""What ranks do in the tests of `mvl check`: record a layout, sound or with one layer spoilt."""

from pathlib import Path

import torch
import torch.distributed

from megatron_vl.config.load import load_stage
from megatron_vl.config.shorten import shorten
from megatron_vl.engine import hybrid_stack
from megatron_vl.train.record import record


def sound(file: Path, overrides: list[str], folder: Path) -> None:
    """Record a layout."""
    config = shorten(load_stage(file, overrides))
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    record(config, folder)


def spoilt(file: Path, overrides: list[str], folder: Path) -> None:
    """Record a layout whose Mamba layers forget on the last rank that documents end."""
    original = hybrid_stack.PackedMambaMixer._ssm_training
    spoils = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1

    def leaks(self, zxBCdt, packed_seq_params=None):
        if spoils:
            packed_seq_params.document_ids_BL = torch.zeros_like(packed_seq_params.document_ids_BL)
        return original(self, zxBCdt, packed_seq_params)

    hybrid_stack.PackedMambaMixer._ssm_training = leaks
    try:
        sound(file, overrides, folder)
    finally:
        hybrid_stack.PackedMambaMixer._ssm_training = original
