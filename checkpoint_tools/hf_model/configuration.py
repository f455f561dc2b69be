"""Configuration of NemotronH_Nano_VL_V2: a NemotronH decoder and a RADIO encoder.

The decoder's section is transformers' own NemotronHConfig. The encoder's stays as it was published
(its `args` are what serving programs read) and gives transformers' RadioConfig when asked.
"""

from typing import Any

from transformers import NemotronHConfig, PretrainedConfig, RadioConfig

_RADIO_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps",
    "qkv_bias", "patch_size", "image_size", "num_cls_tokens", "num_registers", "summary_idxs",
    "norm_mean", "norm_std",
)  # fmt: skip


class NemotronH_Nano_VL_V2_VisionConfig(PretrainedConfig):
    """The RADIO encoder as published."""

    model_type = "radio"

    def radio(self) -> RadioConfig:
        """The same as transformers' own configuration."""
        return RadioConfig(
            mlp_ratio=self.intermediate_size / self.hidden_size,
            max_img_size=self.args["cpe_max_size"],
            **{name: getattr(self, name) for name in _RADIO_FIELDS},
        )


class NemotronH_Nano_VL_V2_Config(PretrainedConfig):
    """The composed model; `llm_config` and `text_config` are one object."""

    model_type = "NemotronH_Nano_VL_V2"
    sub_configs = {  # noqa: RUF012
        "text_config": NemotronHConfig,
        "vision_config": NemotronH_Nano_VL_V2_VisionConfig,
    }

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        llm_config: dict[str, Any] | PretrainedConfig | None = None,
        text_config: dict[str, Any] | PretrainedConfig | None = None,
        **kwargs: Any,
    ) -> None:
        decoder = llm_config if llm_config is not None else text_config
        if isinstance(decoder, PretrainedConfig):
            self.text_config = decoder
        else:
            self.text_config = NemotronHConfig(**(decoder or {}))
        if isinstance(vision_config, PretrainedConfig):
            self.vision_config = vision_config
        else:
            self.vision_config = NemotronH_Nano_VL_V2_VisionConfig(**(vision_config or {}))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(**kwargs)

    @property
    def llm_config(self) -> PretrainedConfig:
        """The decoder's section under its published name."""
        return self.text_config
