"""Importing the engine first readies megatron-core for this machine, with or without CUDA."""

import megatron_vl.engine  # noqa: F401
