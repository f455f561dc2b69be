"""Exports in transformers, without network: its native classes and the shipped code.

Logits and features are compared with this project's model, which loads the same weights from the
stage folder through the trainer's own path.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from checkpoint_tools.published_folder import CONFIG_FILE
from megatron_vl.data.encode import encode_prompt
from megatron_vl.data.pack import Pack
from megatron_vl.infer.model import OpenModel, open_model
from megatron_vl.model.visual import visual_input
from tests.checkpoint_tools.published import VOCABULARY, read_all

TOLERANCE = 1e-4
NEW_TOKENS = 32
QUESTION = "bad cab gaffe?"
# Two rows and two columns of tiles: in one column, their order could not be wrong.
PICTURE = Image.fromarray(np.random.default_rng(5).integers(0, 256, (90, 93, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def ours(stage_folder: Path) -> Iterator[OpenModel]:
    with open_model(stage_folder) as model:
        yield model


@pytest.fixture(scope="module")
def theirs(release: Path, offline: None) -> nn.Module:
    """The exported folder as its reader would open it; nothing missing, nothing left over."""
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(
        release, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    left = {key: value for key, value in loading.items() if value}
    assert not left, left
    return model.eval()


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, of values whose largest is 1."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def prompt(model: OpenModel, with_picture: bool) -> Pack:
    """The question as this project asks it."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
    images: list[bytes] = []
    if with_picture:
        parts.insert(0, {"type": "image", "image": "picture.png"})
        file = io.BytesIO()
        PICTURE.save(file, "PNG")
        images.append(file.getvalue())
    return encode_prompt(model.config, [{"role": "user", "content": parts}], images, False)


def inputs(processor: Any, with_picture: bool) -> dict[str, Tensor]:
    """The question as a reader of the model card asks it."""
    content: list[dict[str, Any]] = [{"type": "text", "text": QUESTION}]
    if with_picture:
        content.insert(0, {"type": "image"})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, enable_thinking=False
    )
    return dict(
        processor(images=[PICTURE] if with_picture else None, text=text, return_tensors="pt")
    )


def test_the_classes_are_the_shipped_ones(theirs: nn.Module, processor: Any) -> None:
    assert type(theirs).__module__.startswith("transformers_modules.")
    assert type(processor).__module__.startswith("transformers_modules.")
    assert type(theirs.language_model) is transformers.NemotronHForCausalLM
    assert type(theirs.vision_model) is transformers.RadioModel


@pytest.mark.parametrize("with_picture", [False, True], ids=["text", "image"])
@torch.no_grad()
def test_logits_and_greedy_answers(
    ours: OpenModel, theirs: nn.Module, processor: Any, with_picture: bool
) -> None:
    pack, given = prompt(ours, with_picture), inputs(processor, with_picture)
    assert given["input_ids"][0].tolist() == pack.tokens_L.tolist()
    logits = theirs(**given).logits[0, -1]
    assert worst(ours.last_logits(pack, []), logits) < TOLERANCE
    said: list[int] = []
    for _ in range(NEW_TOKENS):
        said.append(int(ours.last_logits(pack, said).argmax()))
    assert len(set(said)) > 5
    answer = theirs.generate(
        **given, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=-1
    )
    assert answer[0, given["input_ids"].shape[1] :].tolist() == said


def test_the_picture_has_rows_and_columns(processor: Any) -> None:
    assert len(processor.image_processor.tiles(PICTURE, 4)) == 2 * 2 + 1


@torch.no_grad()
def test_the_picture_matters(ours: OpenModel, theirs: nn.Module, processor: Any) -> None:
    """So that the agreement above is not that of two blind models."""
    given = inputs(processor, True)
    other = {**given, "pixel_values": given["pixel_values"].flip(0)}
    assert worst(theirs(**given).logits[0, -1], theirs(**other).logits[0, -1]) > 100 * TOLERANCE


@torch.no_grad()
def test_the_clamp_of_dt_would_show(theirs: nn.Module, processor: Any) -> None:
    """transformers' default floor changes these logits: the exported one has to be out of reach."""
    mixers = [m for m in theirs.modules() if hasattr(m, "time_step_limit")]
    assert mixers
    given = inputs(processor, False)
    free = theirs(**given).logits[0, -1]
    limits = [mixer.time_step_limit for mixer in mixers]
    for mixer in mixers:
        mixer.time_step_limit = (0.001, float("inf"))
    clamped = theirs(**given).logits[0, -1]
    for mixer, limit in zip(mixers, limits, strict=True):
        mixer.time_step_limit = limit
    assert worst(clamped, free) > 2 * TOLERANCE


@torch.no_grad()
def test_features_and_visual_embeddings(ours: OpenModel, theirs: nn.Module, processor: Any) -> None:
    pixels = inputs(processor, True)["pixel_values"]
    visual = visual_input(prompt(ours, True), torch.device("cpu"))
    features = ours.module.vision_model(visual.patches_PF, visual.grids)
    assert worst(features, theirs.vision_model(pixels).features.flatten(0, 1)) < TOLERANCE
    embeddings = ours.module.encode(visual.patches_PF, visual.grids).squeeze(1)
    assert worst(embeddings, theirs.get_image_features(pixels).flatten(0, 1)) < TOLERANCE


@pytest.mark.parametrize("prefix", ["language_model.", "vision_model."])
@torch.no_grad()
def test_native_classes_load_their_part(
    ours: OpenModel, release: Path, processor: Any, tmp_path: Path, prefix: str
) -> None:
    """A part under its published names, opened by transformers' own AutoModel."""
    from safetensors.torch import save_file

    held = {
        name.removeprefix(prefix): tensor
        for name, tensor in read_all(release).items()
        if name.startswith(prefix)
    }
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((release / CONFIG_FILE).read_text())
    if prefix == "language_model.":
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config["llm_config"]))
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        given = inputs(processor, False)
        expected = model.eval()(**given).logits[0, -1]
        assert worst(ours.last_logits(prompt(ours, False), []), expected) < TOLERANCE
        return
    radio = theirs_radio(config["vision_config"])
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"model_type": "radio", **radio}))
    encoder = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tiles = processor.image_processor.tiles(PICTURE, 4)
    visual = visual_input(prompt(ours, True), torch.device("cpu"))
    features = ours.module.vision_model(visual.patches_PF, visual.grids)
    assert worst(features, encoder(tiles.float() / 255).features.flatten(0, 1)) < TOLERANCE


def theirs_radio(vision: dict[str, Any]) -> dict[str, Any]:
    """The published vision_config in the words of RadioConfig."""
    own = ("hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    own += ("patch_size", "image_size", "num_cls_tokens", "num_registers", "summary_idxs")
    return {
        **{name: vision[name] for name in own},
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
        "max_img_size": vision["args"]["cpe_max_size"],
    }


@pytest.fixture(scope="module")
def omni(release: Path, offline: None) -> Any:
    """The native successor class, without audio, on the exported files as they are."""
    if not hasattr(transformers, "NemotronH_Omni_Reasoning_V3"):
        pytest.skip("this transformers has no nemotron_h_omni")
    config = json.loads((release / CONFIG_FILE).read_text())
    radio = {**theirs_radio(config["vision_config"]), "video_temporal_patch_size": 2}
    omni = transformers.NemotronH_Omni_Reasoning_V3_Config(
        text_config=config["llm_config"],
        vision_config=radio,
        audio_config=None,
        force_image_size=config["force_image_size"],
        projector_hidden_size=config["projector_hidden_size"],
        vision_hidden_size=config["vit_hidden_size"],
        image_token_id=config["img_context_token_id"],
    )
    return transformers.NemotronH_Omni_Reasoning_V3.from_pretrained(
        release, config=omni, dtype=torch.float32
    ).eval()


@torch.no_grad()
def test_nemotron_h_omni_reads_the_same_shards(ours: OpenModel, omni: Any, processor: Any) -> None:
    given = inputs(processor, True)
    tiles = given.pop("pixel_values")
    patch = ours.config.model.encoder.patch_size
    edge = tiles.shape[-1] // patch
    patches = tiles.unflatten(2, (edge, patch)).unflatten(4, (edge, patch))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)
    given |= {
        "pixel_values": patches,
        "image_grid_hw": torch.tensor([[edge, edge]] * len(tiles)),
    }
    logits = omni(**given).logits[0, -1]
    pack = prompt(ours, True)
    assert worst(ours.last_logits(pack, []), logits[:VOCABULARY]) < TOLERANCE
    decoding = ours.decoding(pack.num_tokens + NEW_TOKENS)
    said = [int(decoding.prefill(pack).argmax())]
    while len(said) < NEW_TOKENS:
        said.append(int(decoding.push(said[-1]).argmax()))
    answer = omni.generate(
        **given, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=-1
    )
    assert answer[0, given["input_ids"].shape[1] :].tolist() == said


@torch.no_grad()
def test_the_projectors_epsilon_on_small_features(
    ours: OpenModel, theirs: nn.Module, omni: Any
) -> None:
    """On features of usual size a wrong epsilon moves nothing; on these it moves all."""
    width = 4 * ours.config.model.encoder.hidden_size
    features = 1e-3 * torch.randn(19, width, generator=torch.Generator().manual_seed(4))
    made = ours.module.vision_projection(features.unsqueeze(1)).squeeze(1)
    assert worst(made, theirs.mlp1(features)) < TOLERANCE
    native = omni.multi_modal_projector
    assert worst(made, native(features)) < TOLERANCE
    native.layer_norm.variance_epsilon = 1e-6
    assert worst(made, native(features)) > 1e3 * TOLERANCE
    native.layer_norm.variance_epsilon = 1e-5


@torch.no_grad()
def test_the_epsilons_of_encoder_and_decoder_on_small_streams(
    ours: OpenModel, theirs: nn.Module, processor: Any
) -> None:
    """Both read what embeddings 1024 times smaller give, where the first norms' epsilons count."""
    module, small = ours.module, 2.0**-10  # scaling by it is exact, and so is undoing it
    decoder, encoder = theirs.language_model, theirs.vision_model
    scaled = [
        module.language_model.embedding.word_embeddings.weight,
        module.vision_model.embedder.weight,
        module.vision_model.position_embeddings,
        module.vision_model.class_token,
        decoder.get_input_embeddings().weight,
        *encoder.embeddings.parameters(),
    ]
    pack, given = prompt(ours, False), inputs(processor, False)
    visual = visual_input(prompt(ours, True), torch.device("cpu"))
    pixels = inputs(processor, True)["pixel_values"]
    before = ours.last_logits(pack, [])
    for parameter in scaled:
        parameter.mul_(small)
    try:
        logits = ours.last_logits(pack, [])
        assert worst(logits, before) > 10 * TOLERANCE
        assert worst(logits, theirs(**given).logits[0, -1]) < TOLERANCE
        features = module.vision_model(visual.patches_PF, visual.grids)
        assert worst(features, encoder(pixels).features.flatten(0, 1)) < TOLERANCE
    finally:
        for parameter in scaled:
            parameter.div_(small)
