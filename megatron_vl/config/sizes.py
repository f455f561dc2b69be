"""The keys in which recipes of one flow may differ: how large it is, and what a size asks for.

The laptop recipe and the 12B recipe are the same flow at two sizes. A test holds them together:
stage by stage they set the same keys, and differ in none but these.
"""

from collections.abc import Mapping

_MODEL = "the model's size"
_LENGTH = "how long packs and stages are"
_LAYOUT = "how many ranks there are, and what their memory asks for"
_DATA = "what can be had at that size"
_PACE = "how often a stage of that length looks up and saves"
_LEARNING = "learning rates follow the size of model and batch"

SIZE_KEYS: Mapping[str, str] = {
    "precision": "the arithmetic that the machine is fast at",
    "model.vocab_size": _MODEL,
    "model.padded_vocab_size": _MODEL,
    "model.decoder.pattern": _MODEL,
    "model.decoder.hidden_size": _MODEL,
    "model.decoder.ffn_hidden_size": _MODEL,
    "model.decoder.num_attention_heads": _MODEL,
    "model.decoder.num_query_groups": _MODEL,
    "model.decoder.head_dim": _MODEL,
    "model.decoder.mamba_num_heads": _MODEL,
    "model.decoder.mamba_head_dim": _MODEL,
    "model.decoder.mamba_state_dim": _MODEL,
    "model.decoder.mamba_num_groups": _MODEL,
    "model.decoder.mamba_chunk_size": _MODEL,
    "model.encoder.num_layers": _MODEL,
    "model.encoder.hidden_size": _MODEL,
    "model.encoder.ffn_hidden_size": _MODEL,
    "model.encoder.num_attention_heads": _MODEL,
    "model.encoder.patch_size": _MODEL,
    "model.encoder.position_grid": _MODEL,
    "model.encoder.num_prefix_tokens": _MODEL,
    "model.projector.ffn_hidden_size": _MODEL,
    "data.root": _DATA,
    "data.builder": _DATA,
    "data.tokenizer": _DATA,
    "data.blend": _DATA,
    "data.blend_unit": _DATA,
    "data.epochs": _DATA,
    "data.when_source_ends": _DATA,
    "data.sequence_length": _LENGTH,
    "data.tile_size": _MODEL,
    "data.max_tiles": _LENGTH,
    "data.video.min_frames": _LENGTH,
    "data.video.max_frames": _LENGTH,
    "data.video.evs_rate": "pruned clips keep the laptop's video short; the paper trains unpruned",
    "data.packing": "stage 0 of the laptop packs, or its few steps would see few samples",
    "data.packing_window": _DATA,
    "data.packer": "the packer that fills best, or the published one",
    "data.spare_packs": "goes with the packer",
    "data.document_alignment": _LAYOUT,
    "data.max_tiles_per_pack": _LAYOUT,
    "data.max_samples_per_pack": _LAYOUT,
    "data.aligned_packs": _LAYOUT,
    "data.workers": _LAYOUT,
    "data.prefetch": _LAYOUT,
    "parallel.tensor": _LAYOUT,
    "parallel.pipeline": _LAYOUT,
    "parallel.context": _LAYOUT,
    "parallel.data": _LAYOUT,
    "parallel.sequence": _LAYOUT,
    "recompute.decoder": _LAYOUT,
    "recompute.encoder": _LAYOUT,
    "optimizer.lr": _LEARNING,
    "train.steps": _LENGTH,
    "train.tokens": _LENGTH,
    "train.samples": _LENGTH,
    "train.global_batch": _LENGTH,
    "train.threads": _LAYOUT,
    "train.loss_chunk": _LAYOUT,
    "train.peak_tflops": _LAYOUT,
    "evaluation.every": _PACE,
    "evaluation.batches": _PACE,
    "evaluation.packs": _PACE,
    "evaluation.longest_pack": _PACE,
    "checkpoint.every": _PACE,
    "checkpoint.optimizer": _PACE,
    "checkpoint.any_layout": _PACE,
    "distill.calibration_batches": _LENGTH,
    "after": "which evaluations stand between the stages",
}
"""Each key with why a size may change it."""
