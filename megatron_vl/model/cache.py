"""Keys, values and Mamba states of one conversation, so that a new token costs one token.

The prompt runs through the model's own layers once and leaves behind the keys and values of every
attention layer and, of every Mamba layer, the last inputs of its convolution and its state. Each
token after that reads them and moves them on. The layers' own inference path is megatron-core's;
where its kernels need CUDA the project's stand in (`kernels.decode`, `kernels.conv1d`).

Refuses more tokens than it was made for. Costs, of the 12B in bfloat16, 24 KiB of keys and values a
token of room, and 142 MiB of Mamba states (in float32, whatever the weights' type) whatever the
length. Only the last position's logits are ever made. All runs in inference mode: a step of a small
model is mostly book-keeping, and without autograd's it takes a sixth less.

Shapes: L tokens, B batch (1), H decoder width, V vocabulary.
"""

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from megatron_vl.data.pack import Pack
from megatron_vl.engine.packed import packed_sequence
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.model.visual import visual_input
from megatron_vl.model.vlm import VisionLanguageModel


class DecodingCache:
    """What a model remembers of one conversation.

    Args:
        module: the whole model, on this rank, in evaluation mode.
        room: most tokens of prompt and answer together. [tokens]
    """

    def __init__(self, module: VisionLanguageModel, room: int) -> None:
        assert module.pre_process
        assert module.post_process
        assert not module.training
        self._module = module
        self._context = StaticInferenceContext(max_batch_size=1, max_sequence_length=room)

    @property
    def num_tokens(self) -> int:
        """Tokens it has seen."""
        return int(self._context.sequence_len_offset)

    @torch.inference_mode()
    def prefill(self, prompt: Pack) -> Tensor:
        """Read the prompt, pictures included; call once, before any `push`.

        Args:
            prompt: a pack of one document without padding.

        Returns:
            Logits (V,) after its last token, float32; the vocabulary's padding rows included.

        Raises:
            ValueError: the prompt is longer than the room.
        """
        assert self.num_tokens == 0
        assert len(prompt.document_lengths) == 1
        device = PLATFORM.device
        documents = packed_sequence(
            prompt.document_ids_L, prompt.cu_seqlens, prompt.max_document_length, device
        )
        hidden_LBH = self._module.embed(
            prompt.tokens_L.to(device).unsqueeze(0), visual_input(prompt, device), documents
        )
        return self._advance(hidden_LBH)

    @torch.inference_mode()
    def push(self, token: int) -> Tensor:
        """Read one more token, which is no picture.

        Returns:
            Logits (V,) after it, float32.

        Raises:
            ValueError: the room is full.
        """
        assert self.num_tokens > 0, "the prompt comes first"
        tokens_BL = torch.tensor([[token]], device=PLATFORM.device)
        embedding = self._module.language_model.embedding
        return self._advance(embedding(input_ids=tokens_BL, position_ids=None))

    def _advance(self, hidden_LBH: Tensor) -> Tensor:
        after = self.num_tokens + hidden_LBH.shape[0]
        room = self._context.max_sequence_length
        if after > room:
            raise ValueError(f"{after} tokens do not fit the {room} there is room for")
        decoder = self._module.language_model
        hidden_LBH = decoder.decoder(
            hidden_states=hidden_LBH, attention_mask=None, inference_context=self._context
        )
        self._context.sequence_len_offset = after
        self._context.enable_decode_mode()
        logits_LBV, _ = decoder.output_layer(hidden_LBH[-1:])
        return logits_LBV.flatten().float()
