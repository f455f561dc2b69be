"""What vLLM's CPU build is changed in before the engine is made; runs in `.venv-vllm`.

`watch_encoder` changes nothing that is computed. `meet_in_one_type` lets pictures be served in
float32: vLLM rounds the encoder's output to bfloat16 whatever its type is and then multiplies it
with the projector's weights, which fails unless both are of one type. `emulate_quantized` gives the
CPU the two operations it lacks for FP8 and NVFP4 weights; both are arithmetic the formats define.
"""


def watch_encoder():
    """Every batch of tiles that goes into the encoder from now on, float32, in a list."""
    from vllm.model_executor.models.nano_nemotron_vl import NemotronH_Nano_VL_V2 as Served

    shown, extract = [], Served.extract_feature

    def watched(self, pixel_values, *args, **kwargs):
        shown.append(pixel_values.detach().float().cpu())
        return extract(self, pixel_values, *args, **kwargs)

    Served.extract_feature = watched
    return shown


def meet_in_one_type():
    """Give the projector its input in the type of its weights."""
    from vllm.model_executor.models.nano_nemotron_vl import NemotronH_Nano_VL_V2 as Served

    make = Served.__init__

    def in_own_type(module, inputs):
        return (inputs[0].to(module[1].weight.dtype),)

    def made(self, *, vllm_config, prefix=""):
        make(self, vllm_config=vllm_config, prefix=prefix)
        self.mlp1.register_forward_pre_hook(in_own_type)

    Served.__init__ = made


def emulate_quantized():
    """FP8 quantization of inputs in torch, and vLLM's own NVFP4 emulation also on a CPU.

    FP8 products are torch's on every CPU: where it has AMX, vLLM would not quantize their inputs.
    ModelOpt's layout is let in for float32 too, where the codes do not hang on roundings before.
    """
    import torch

    from vllm import _custom_ops
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm import pytorch
    from vllm.model_executor.layers.quantization import modelopt
    from vllm.platforms import PlatformEnum

    types = [torch.float32, torch.bfloat16, torch.float16]
    for layout in (modelopt.ModelOptFp8Config, modelopt.ModelOptNvFp4Config):
        layout.get_supported_act_dtypes = lambda self: types
    _custom_ops.scaled_fp8_quant = _scaled_fp8_quant
    linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU] = [pytorch.PerTensorTorchFP8ScaledMMLinearKernel]
    linear._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [EmulationNvFp4LinearKernel]


def _scaled_fp8_quant(input, scale=None, *args, output=None, **kwargs):
    import torch

    if scale is None:
        scale = (input.abs().max().float() / 448.0).clamp(min=1e-12).reshape(1)
    codes = (input.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    if output is not None:
        codes = output.copy_(codes)
    return codes, scale
