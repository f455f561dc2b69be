"""The engine room: everything that touches megatron-core's private names or stands in for CUDA.

Importing this package prepares megatron-core for the machine at hand (see `platform.prepare`), so
the packages above it (`model`, `train`, `infer`) import it first, in their own `__init__`.
"""

from megatron_vl.engine.platform import PLATFORM, prepare

prepare(PLATFORM)
