"""The encoder, projector and decoder against transformers' own classes, with random weights."""

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import patches_of
from megatron_vl.model.projector import pixel_shuffle
from megatron_vl.model.radio import PIXEL_MEAN, PIXEL_STD
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.sequence.visual import PatchGrid
from tests.support.packs import pack_of_documents, run_pack, text_document
from tests.support.their_decoder import split_qkv, their_decoder

TOLERANCE = 2e-5


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.fixture(scope="module")
def nemotron_h(model: VisionLanguageModel, config: StageConfig) -> nn.Module:
    return their_decoder(model, config)


def test_decoder_logits(
    model: VisionLanguageModel, config: StageConfig, nemotron_h: nn.Module
) -> None:
    """Two documents in one pack against each alone in transformers' model."""
    generator = torch.Generator().manual_seed(5)
    lengths = (93, 70)
    documents = [
        torch.randint(0, config.model.vocab_size - 10, (n,), generator=generator) for n in lengths
    ]
    pack = pack_of_documents(config, [text_document(d.tolist()) for d in documents], [])
    with torch.no_grad():
        ours_LV = run_pack(model, pack)
        theirs = [nemotron_h(document.unsqueeze(0)).logits[0] for document in documents]
    for ours, expected in zip(ours_LV.split(lengths), theirs, strict=True):
        assert relative_error(ours, expected) < TOLERANCE


def encoder_weights(model: VisionLanguageModel, config: StageConfig) -> dict[str, Tensor]:
    """Our encoder under transformers' names."""
    ours = model.vision_model.state_dict()
    sizes = config.model.encoder
    theirs = {
        "embeddings.patch_projection.weight": ours["embedder.weight"],
        "embeddings.position_embedding": ours["position_embeddings"],
        "embeddings.cls_register_token": ours["class_token"],
    }
    width = sizes.hidden_size // sizes.num_attention_heads
    for layer in range(sizes.num_layers):
        prefix = f"decoder.layers.{layer}."
        name = f"encoder.layer.{layer}."
        for leaf in ("weight", "bias"):
            attention, mlp = prefix + "self_attention.", prefix + "mlp."
            theirs[f"{name}norm1.{leaf}"] = ours[f"{attention}linear_qkv.layer_norm_{leaf}"]
            theirs[f"{name}norm2.{leaf}"] = ours[f"{mlp}linear_fc1.layer_norm_{leaf}"]
            qkv = split_qkv(
                ours[f"{attention}linear_qkv.{leaf}"],
                sizes.num_attention_heads,
                sizes.num_attention_heads,
                width,
            )
            for kind, values in zip("qkv", qkv, strict=True):
                theirs[f"{name}attention.{kind}_proj.{leaf}"] = values
            theirs[f"{name}attention.o_proj.{leaf}"] = ours[f"{attention}linear_proj.{leaf}"]
            theirs[f"{name}mlp.fc1.{leaf}"] = ours[f"{mlp}linear_fc1.{leaf}"]
            theirs[f"{name}mlp.fc2.{leaf}"] = ours[f"{mlp}linear_fc2.{leaf}"]
    return theirs


@pytest.fixture(scope="module")
def radio(model: VisionLanguageModel, config: StageConfig) -> nn.Module:
    sizes = config.model.encoder
    theirs = transformers.RadioModel(
        transformers.RadioConfig(
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_attention_heads,
            mlp_ratio=sizes.ffn_hidden_size / sizes.hidden_size,
            layer_norm_eps=sizes.norm_epsilon,
            patch_size=sizes.patch_size,
            max_img_size=sizes.position_grid * sizes.patch_size,
            num_cls_tokens=4,
            num_registers=sizes.num_prefix_tokens - 4,
            norm_mean=PIXEL_MEAN,
            norm_std=PIXEL_STD,
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(encoder_weights(model, config), strict=False)
    assert not unexpected
    assert not [
        name
        for name in missing
        if "layer_scale" not in name and "norm_" not in name and "summary_idxs" not in name
    ]
    return theirs


def drawn_units(grid: tuple[int, int], patch_size: int, seed: int, units: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (units, 3, *(edge * patch_size for edge in grid))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("grid", [(8, 8), (6, 4), (4, 10), (5, 7), (1, 13), (32, 32)], ids=str)
def test_encoder_features(
    model: VisionLanguageModel, config: StageConfig, radio: nn.Module, grid: tuple[int, int]
) -> None:
    """Square, oblong and odd grids: patches, cropped positions, prefix tokens, every layer."""
    sizes = config.model.encoder
    units_UCHW = drawn_units(grid, sizes.patch_size, 7, units=3)
    patches_PF = torch.from_numpy(patches_of(units_UCHW.numpy(), sizes.patch_size))
    with torch.no_grad():
        ours = model.vision_model(patches_PF, [PatchGrid(*grid)] * 3)
        expected = radio(units_UCHW.float() / 255).features
    assert ours.shape == (3 * grid[0] * grid[1], sizes.hidden_size)
    assert relative_error(ours, expected.flatten(0, 1)) < TOLERANCE


def test_units_of_several_shapes_in_one_batch(
    model: VisionLanguageModel, config: StageConfig, radio: nn.Module
) -> None:
    """One sequence of mixed grids against each unit alone in transformers' encoder."""
    sizes = config.model.encoder
    grids = [(8, 8), (3, 11), (5, 2), (8, 8), (1, 1)]
    units = [drawn_units(grid, sizes.patch_size, 10 + i) for i, grid in enumerate(grids)]
    patches = [patches_of(unit.numpy(), sizes.patch_size) for unit in units]
    with torch.no_grad():
        ours = model.vision_model(
            torch.from_numpy(np.concatenate(patches)), [PatchGrid(*grid) for grid in grids]
        )
        expected = [radio(unit.float() / 255).features[0] for unit in units]
    for one, other in zip(ours.split([len(patch) for patch in patches]), expected, strict=True):
        assert relative_error(one, other) < TOLERANCE


def test_gradients_of_a_mixed_batch_are_those_of_its_units(
    model: VisionLanguageModel, config: StageConfig
) -> None:
    """Embeddings and every gradient: all units at once against one at a time, odd edges too."""
    size = config.model.encoder.patch_size
    grids = [PatchGrid(8, 8), PatchGrid(3, 5), PatchGrid(6, 4)]
    patches = [
        torch.from_numpy(patches_of(drawn_units(grid, size, 30 + i).numpy(), size))
        for i, grid in enumerate(grids)
    ]
    weights = torch.randn(
        sum(grid.tokens for grid in grids),
        1,
        config.model.decoder.hidden_size,
        generator=torch.Generator().manual_seed(9),
    )
    parameters = dict(model.vision_model.named_parameters(prefix="encoder"))
    parameters |= dict(model.vision_projection.named_parameters(prefix="projector"))

    def run(one_at_a_time: bool) -> tuple[Tensor, dict[str, Tensor]]:
        if one_at_a_time:
            parts = [model.encode(p, [g]) for p, g in zip(patches, grids, strict=True)]
            embeddings = torch.cat(parts)
        else:
            embeddings = model.encode(torch.cat(patches), grids)
        gradients = torch.autograd.grad((embeddings * weights).sum(), list(parameters.values()))
        return embeddings.detach(), dict(zip(parameters, gradients, strict=True))

    (together, ours), (alone, expected) = run(False), run(True)
    assert relative_error(together, alone) < TOLERANCE
    for name, gradient in expected.items():
        assert relative_error(ours[name], gradient) < TOLERANCE, name


def test_a_grid_beyond_the_position_table_is_refused(model: VisionLanguageModel) -> None:
    grid = PatchGrid(1, 33)
    patches_PF = torch.zeros(grid.patches, 3 * 64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"1x33 patches exceeds .* the largest edge is 32"):
        model.vision_model(patches_PF, [grid])


def test_projector(model: VisionLanguageModel, config: StageConfig) -> None:
    """The published mlp1 written out: RMSNorm, linear, squared ReLU, linear."""
    width = 4 * config.model.encoder.hidden_size
    hidden = torch.randn(37, 1, width, generator=torch.Generator().manual_seed(6))
    weights = model.vision_projection.encoder.state_dict()
    scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + config.model.projector.norm_epsilon)
    normed = hidden * scale * weights["linear_fc1.layer_norm_weight"]
    inner = torch.relu(normed @ weights["linear_fc1.weight"].T) ** 2
    with torch.no_grad():
        ours = model.vision_projection(hidden)
    assert relative_error(ours, inner @ weights["linear_fc2.weight"].T) < TOLERANCE


def test_pixel_shuffle_places_every_patch() -> None:
    """Position (i, j) holds patches (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1), in this order;
    beyond an odd edge stand zeros."""
    grids = [PatchGrid(4, 6), PatchGrid(3, 3)]
    patches_PE = torch.arange(1, 34).reshape(33, 1)
    shuffled = pixel_shuffle(patches_PE, grids)
    assert shuffled.shape == (6 + 4, 4)
    assert shuffled[:3].tolist() == [[1, 2, 7, 8], [3, 4, 9, 10], [5, 6, 11, 12]]
    assert shuffled[3:6].tolist() == [[13, 14, 19, 20], [15, 16, 21, 22], [17, 18, 23, 24]]
    assert shuffled[6:].tolist() == [
        [25, 26, 28, 29],
        [27, 0, 30, 0],
        [31, 32, 0, 0],
        [33, 0, 0, 0],
    ]
    wide = torch.stack([patches_PE.squeeze(1), -patches_PE.squeeze(1)], dim=1)
    assert pixel_shuffle(wide, grids)[0].tolist() == [1, -1, 2, -2, 7, -7, 8, -8]
