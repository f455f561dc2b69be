"""What a stage's checks say of overrides."""

from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import load_stage
from tests.conftest import LAPTOP


def problems(*overrides: str) -> list[str]:
    """The messages of laptop stage 1 with these overrides; none where it is sound."""
    try:
        load_stage(LAPTOP / "stage1.yaml", overrides)
    except ConfigError as error:
        return error.problems
    return []
