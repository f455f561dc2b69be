"""What this machine offers, and how megatron-core is made ready for it.

megatron-core 0.16 is used unmodified. It takes three things for granted that a laptop lacks: a
CUDA device, Triton, and the `mamba_ssm`/`causal_conv1d` packages. `prepare` supplies stand-ins for
exactly those that are missing, before megatron-core is imported, and nothing where all are there.

Cost: one import of megatron-core (about 4 s on a laptop). Refuses: a megatron-core version other
than the pinned 0.16 series, whose private names the stand-ins were checked against.
"""

import importlib.metadata
import importlib.util
import logging
import warnings
from dataclasses import dataclass

import torch

SUPPORTED_CORE_SERIES = "0.16."

# What megatron-core and torch say at every start on a machine without apex and Transformer Engine,
# or of calls megatron-core makes: nothing a user of this project can or should act on.
KNOWN_WARNINGS = (
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    "Apex is not installed. Falling back to Torch Norm",
    r"`torch\.distributed\.\w+` is deprecated",
    "When using async grad allreduce it is recommended",
)
TALKATIVE_LOGGERS = ("megatron.core.rerun_state_machine",)


@dataclass(frozen=True)
class Platform:
    """The accelerator and the optional packages of this machine.

    Attributes:
        device_type: "cuda" or "cpu".
        backend: torch.distributed backend that fits the device.
        has_triton: the Triton compiler can be imported.
        has_mamba_ssm: mamba_ssm's Triton scan kernels can be imported.
        has_causal_conv1d: the CUDA convolution can be imported.
        has_transformer_engine: Transformer Engine's layers can be imported.
    """

    device_type: str
    backend: str
    has_triton: bool
    has_mamba_ssm: bool
    has_causal_conv1d: bool
    has_transformer_engine: bool

    @property
    def device(self) -> torch.device:
        """The device of this process; on CUDA the one `torch.cuda.set_device` chose."""
        if self.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def _importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def detect() -> Platform:
    """Look at the machine. Packages that need CUDA count as absent on a machine without it."""
    on_cuda = torch.cuda.is_available()
    return Platform(
        device_type="cuda" if on_cuda else "cpu",
        backend="nccl" if on_cuda else "gloo",
        has_triton=on_cuda and _importable("triton"),
        has_mamba_ssm=on_cuda and _importable("mamba_ssm"),
        has_causal_conv1d=on_cuda and _importable("causal_conv1d"),
        has_transformer_engine=on_cuda and _importable("transformer_engine"),
    )


PLATFORM = detect()


def prepare(platform: Platform) -> None:
    """Make megatron-core importable and runnable on `platform`. Idempotent.

    Raises:
        ImportError: megatron-core is absent or of a series the stand-ins were not checked against.
    """
    version = importlib.metadata.version("megatron-core")
    if not version.startswith(SUPPORTED_CORE_SERIES):
        raise ImportError(
            f"megatron-core {version} is installed; this project is checked against "
            f"{SUPPORTED_CORE_SERIES}x. Run `make setup`, or "
            "pip install 'megatron-core>=0.16.1,<0.17'."
        )
    from megatron_vl.engine import cpu_port, missing_packages

    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in TALKATIVE_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if platform.device_type == "cpu":
        cpu_port.stand_in_for_cuda()
    missing_packages.import_core_with_stand_ins(platform)
    if platform.device_type == "cpu":
        cpu_port.patch_core()
