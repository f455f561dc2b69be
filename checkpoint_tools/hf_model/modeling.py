"""NemotronH_Nano_VL_V2 for transformers: RADIO encoder, projector, NemotronH decoder.

Encoder and decoder are transformers' own classes; here they are joined.

Shapes: T tiles, C colours, S a tile's edge in pixels, G patches along an edge, E encoder width,
B batch, L tokens, H decoder width, N visual tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, NemotronHForCausalLM, PreTrainedModel, RadioModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration import NemotronH_Nano_VL_V2_Config


class ProjectorNorm(nn.Module):
    """RMSNorm computed in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Norm the last dimension."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return (self.weight.float() * wide).to(hidden.dtype)


class SquaredReLU(nn.Module):
    """max(x, 0)^2."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply it elementwise."""
        return torch.relu(hidden).square()


def pixel_shuffle(features_TGGE: Tensor) -> Tensor:
    """Fold 2 x 2 patches into one of four times the width, row-major (the published "v2")."""
    tiles, rows, columns, width = features_TGGE.shape
    pairs = features_TGGE.reshape(tiles, rows // 2, 2, columns // 2, 2 * width)
    return pairs.transpose(2, 3).reshape(tiles, rows // 2 * (columns // 2), 4 * width)


def _refuse_modelopt(config: NemotronH_Nano_VL_V2_Config) -> None:
    """Raise ValueError for a layout whose codes transformers would take for weights."""
    said = getattr(config, "quantization_config", None)
    if isinstance(said, dict) and said.get("quant_method") == "modelopt":
        raise ValueError(
            "these weights are quantized in ModelOpt's layout, which transformers cannot read; "
            "serve the folder with vLLM, or export with --layout compressed_tensors"
        )


class NemotronH_Nano_VL_V2(PreTrainedModel, GenerationMixin):
    """The composed model."""

    config_class = NemotronH_Nano_VL_V2_Config
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    _is_stateful = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["RadioLayer", "NemotronHBlock"]  # noqa: RUF012
    # RADIO has no layer scale and no conditioner inside the model: images come normalised.
    _keys_to_ignore_on_load_missing = [r"layer_scale\d\.lambda1"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"input_conditioner\."]  # noqa: RUF012

    def __init__(self, config: NemotronH_Nano_VL_V2_Config) -> None:
        _refuse_modelopt(config)
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        width, inner = 4 * vision.hidden_size, config.projector_hidden_size
        self.vision_model = RadioModel._from_config(vision.radio())
        self.vision_model.make_preprocessor_external()
        self.mlp1 = nn.Sequential(
            ProjectorNorm(width, config.projector_norm_epsilon),
            nn.Linear(width, inner, bias=False),
            SquaredReLU(),
            nn.Linear(inner, text.hidden_size, bias=False),
        )
        self.language_model = NemotronHForCausalLM._from_config(text)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The decoder's output layer."""
        return self.language_model.lm_head

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Visual embeddings of normalised tiles.

        Args:
            pixel_values: (T, C, S, S).

        Returns:
            (T, tokens of a tile, H).
        """
        weight = next(self.mlp1.parameters())
        features_TPE = self.vision_model(pixel_values.to(weight.device, weight.dtype)).features
        rows, columns = (edge // self.config.patch_size for edge in pixel_values.shape[-2:])
        return self.mlp1(pixel_shuffle(features_TPE.unflatten(1, (rows, columns))))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model.

        Args:
            input_ids: (B, L), the image token where a visual embedding goes.
            pixel_values: (T, C, S, S), tiles of all images and frames in the order they stand in
                the text, normalised.

        Raises:
            ValueError: the places for visual embeddings and the embeddings differ in number.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None and pixel_values.shape[0]:
                inputs_embeds = self._place(input_ids, inputs_embeds, pixel_values)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _place(self, input_ids: Tensor, embeds_BLH: Tensor, pixel_values: Tensor) -> Tensor:
        visual_NH = self.get_image_features(pixel_values).flatten(0, 1).to(embeds_BLH)
        places_BL = input_ids == self.config.img_context_token_id
        if int(places_BL.sum()) != visual_NH.shape[0]:
            raise ValueError(
                f"the text has {int(places_BL.sum())} image tokens, the pictures give "
                f"{visual_NH.shape[0]} embeddings; let the processor place the tokens"
            )
        return embeds_BLH.masked_scatter(places_BL.unsqueeze(-1), visual_NH)
