"""Which layers run in FP8, that documents stay apart in it, and what other layer specs are told."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vl.config.check_fp8 import bf16_layers, layers_of
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import Fp8Config, Precision, StageConfig
from megatron_vl.data.pack import Pack
from megatron_vl.engine import fp8_state
from megatron_vl.engine.fp8_state import enable_fp8, own_linears, transformer_engine_fields
from megatron_vl.model.vlm import VisionLanguageModel
from tests.conftest import LAPTOP
from tests.support.models import perturbed_model
from tests.support.packs import pack_of_documents, picture_documents, run_pack

LENGTHS = (70, 58, 2, 90, 36)
TILES = (2, 1, 0, 1, 0)


def stage(precision: str, *overrides: str) -> StageConfig:
    return load_stage(
        LAPTOP / "stage1.yaml", ["parallel.data=1", f"precision={precision}", *overrides]
    )


@pytest.fixture(scope="module")
def model() -> Iterator[VisionLanguageModel]:
    with perturbed_model(stage("bf16")) as module:
        yield module


@pytest.fixture(scope="module")
def pack() -> Pack:
    config = stage("bf16")
    generator = torch.Generator().manual_seed(51)
    return pack_of_documents(config, *picture_documents(config, LENGTHS, TILES, generator))


@contextlib.contextmanager
def in_fp8(model: VisionLanguageModel, config: StageConfig) -> Iterator[set[str]]:
    """The model in FP8 for a while; gives the layers that are."""
    enabled = enable_fp8(model, config, model.vision_model.decoder.pg_collection)
    assert enabled is not None
    try:
        yield {place.layer for place in enabled.linears}
    finally:
        for linear in enabled.linears.values():
            linear.arithmetic = None


def logits(model: VisionLanguageModel, pack: Pack) -> Tensor:
    with torch.no_grad():
        return run_pack(model, pack)


def layers(model: VisionLanguageModel) -> dict[str, torch.nn.Module]:
    found = {"projector": model.vision_projection}
    for stack, part in (("decoder", model.language_model), ("encoder", model.vision_model)):
        for index, layer in enumerate(part.decoder.layers):
            found[f"{stack}.{index}"] = layer
    return found


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("precision", ["fp8_tensorwise", "fp8_blockwise", "fp8_delayed"])
def test_kept_layers_compute_in_bf16_and_the_others_do_not(
    model: VisionLanguageModel, pack: Pack, precision: str
) -> None:
    """Each layer again without FP8, from the input it was given: bitwise the same, or not."""
    config = stage(precision, "fp8.keep_bf16=[decoder.5,encoder.2]", "fp8.last_layers_bf16=2")
    calls: dict[str, tuple[Any, Any, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls[name] = (args, kwargs, first(output).clone())

        return hook

    handles = [
        layer.register_forward_hook(keep(name), with_kwargs=True)
        for name, layer in layers(model).items()
    ]
    with in_fp8(model, config) as chosen:
        logits(model, pack)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        differing = {
            name
            for name, layer in layers(model).items()
            if not torch.equal(first(layer(*calls[name][0], **calls[name][1])), calls[name][2])
        }
    expected = {f"decoder.{n}" for n in (1, 2, 3, 4)} | {"encoder.1", "projector"}
    assert differing == chosen == expected == set(layers_of(config)) - bf16_layers(config)


def test_every_linear_of_a_layer_is_taken(model: VisionLanguageModel) -> None:
    """Mamba, attention, MLP, encoder and projector; no embedding, output or patch layer."""
    kinds = {
        (place.layer.partition(".")[0], place.linear.rpartition(".")[2])
        for place, _ in own_linears(model)
    }
    linears = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    assert kinds == {
        *(("decoder", name) for name in ("in_proj", "out_proj", *linears)),
        *(("encoder", name) for name in linears),
        *(("projector", name) for name in ("linear_fc1", "linear_fc2")),
    }
    assert len(list(own_linears(model))) == 2 * 8 + 4 * 4 + 2


def changes(
    model: VisionLanguageModel, pack: Pack, config: StageConfig
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The changed document and the logits before and after: a token of each document, a pixel of
    each tile."""
    before = logits(model, pack)
    starts = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
    for document, start in enumerate(starts.tolist()):
        position = start + LENGTHS[document] - 1
        old = int(pack.tokens_L[position])
        pack.tokens_L[position] = (old + 1) % config.model.vocab_size
        yield document, before, logits(model, pack)
        pack.tokens_L[position] = old
    owners = [document for document, tiles in enumerate(TILES) for _ in range(tiles)]
    for tile, document in enumerate(owners):
        patch = tile * pack.grids[0].patches + 21
        old = int(pack.patches_PF[patch, 77])
        pack.patches_PF[patch, 77] = 255 - old
        yield document, before, logits(model, pack)
        pack.patches_PF[patch, 77] = old


def moved(before: Tensor, after: Tensor) -> list[int]:
    pairs = zip(before.split(LENGTHS), after.split(LENGTHS), strict=True)
    return [number for number, (one, two) in enumerate(pairs) if not torch.equal(one, two)]


def test_blockwise_documents_do_not_move_each_other(model: VisionLanguageModel, pack: Pack) -> None:
    config = stage("fp8_blockwise")
    with in_fp8(model, config):
        for document, before, after in changes(model, pack, config):
            assert moved(before, after) == [document]


@pytest.fixture
def loud_token(model: VisionLanguageModel) -> Iterator[int]:
    """A token that lies in one channel alone, and an MLP that answers to that channel: what the
    squared ReLU passes on is 16 times larger than for any other token."""
    table = model.language_model.embedding.word_embeddings.weight.data
    weight = model.language_model.decoder.layers[1].mlp.linear_fc1.weight.data
    token, channel = 1999, 17
    before = table[token].clone(), weight[0].clone()
    table[token] = 0
    table[token, channel] = 40
    weight[0, channel] = 30
    yield token
    table[token], weight[0] = before


def test_one_scale_for_a_tensor_lets_documents_move_each_other(
    model: VisionLanguageModel,
    pack: Pack,
    loud_token: int,
    record_property: Callable[[str, object], None],
) -> None:
    """The leak of per-tensor FP8, measured: a token of document 0 moves document 3. In blocks the
    same token moves document 0 alone."""
    leaks = {}
    for precision in ("fp8_tensorwise", "fp8_blockwise"):
        with in_fp8(model, stage(precision)):
            before = logits(model, pack)
            old = int(pack.tokens_L[50])
            pack.tokens_L[50] = loud_token
            after = logits(model, pack)
            pack.tokens_L[50] = old
        one, two = before.split(LENGTHS)[3].float(), after.split(LENGTHS)[3].float()
        leaks[precision] = float((one - two).norm() / one.norm())
        assert (moved(before, after) == [0]) == (precision == "fp8_blockwise")
    record_property("leak", leaks["fp8_tensorwise"])
    print(f"per-tensor FP8: document 3 moves by {leaks['fp8_tensorwise']:.2%}")
    assert leaks["fp8_blockwise"] == 0
    assert 1e-4 < leaks["fp8_tensorwise"] < 0.3


def core_config(model: VisionLanguageModel, **fields: object) -> TransformerConfig:
    decoder = model.language_model.decoder.config
    return TransformerConfig(
        num_layers=decoder.num_layers, hidden_size=128, num_attention_heads=4, bf16=True, **fields
    )


@pytest.mark.parametrize("precision", ["fp8_tensorwise", "fp8_blockwise"])
def test_transformer_engine_gets_megatron_cores_fields(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Set on the configs that its stacks read at every pass; accepted by megatron-core's own check;
    and they leave the same layers in BF16."""
    config = stage(precision, "fp8.first_layers_bf16=2")
    fields = transformer_engine_fields(config.precision, config.fp8)
    core_config(model, **fields)
    configs = [
        model.language_model.decoder.config,
        model.vision_model.decoder.config,
        model.vision_projection.config,
    ]
    before = [{name: getattr(one, name) for name in fields} for one in configs]
    monkeypatch.setattr(fp8_state, "own_linears", lambda module: iter(()))
    try:
        enabled = enable_fp8(model, config, model.vision_model.decoder.pg_collection)
        assert enabled is not None
        assert not enabled.linears
        for one in configs:
            assert one.fp8_recipe == precision.removeprefix("fp8_")
            assert one.fp8 == ("e4m3" if precision == "fp8_blockwise" else "hybrid")
        kept = {
            f"{stack}.{index}"
            for stack, one in zip(("decoder", "encoder"), configs, strict=False)
            for index in range(one.num_layers)
            if is_first_last_bf16_layer(one, index)
        }
        assert kept == bf16_layers(config)
    finally:
        for one, values in zip(configs, before, strict=True):
            for name, value in values.items():
                setattr(one, name, value)


def test_transformer_engine_refuses_what_megatron_core_refuses(model: VisionLanguageModel) -> None:
    delayed = Precision.fp8_delayed
    with pytest.raises(
        ValueError, match=r"refuses layers in BF16 .* nearest valid: .*fp8_blockwise"
    ):
        transformer_engine_fields(delayed, Fp8Config())
    with pytest.raises(ValueError, match="Delayed scaling does not support"):
        core_config(model, fp8="hybrid", fp8_recipe="delayed", first_last_layers_bf16=True)
    none = Fp8Config(first_layers_bf16=0, last_layers_bf16=0, amax_history=7)
    accepted = core_config(model, **transformer_engine_fields(delayed, none))
    assert (accepted.fp8_recipe, accepted.fp8_amax_history_len) == ("delayed", 7)
    for wrong in (replace(none, keep_bf16=["decoder.5"]), replace(none, drift_every=3)):
        with pytest.raises(ValueError, match=r"no such switch; nearest valid: (\[\]|0)"):
            transformer_engine_fields(delayed, wrong)


def test_transformer_engine_refuses_images_of_any_size(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its FP8 products assert multiples of 8 and 16 in the middle of a step."""
    monkeypatch.setattr(fp8_state, "own_linears", lambda module: iter(()))
    config = stage("fp8_blockwise", "data.tiling=native_matched")
    with pytest.raises(
        ValueError, match=r"native_matched .* nearest valid: data\.tiling published"
    ):
        enable_fp8(model, config, model.vision_model.decoder.pg_collection)


def test_a_device_without_such_products_is_refused(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_state, "why_unsupported", lambda device, blockwise: "it is old")
    for precision, nearest in (("fp8_blockwise", "fp8_tensorwise"), ("fp8_delayed", "bf16")):
        with pytest.raises(ValueError, match=rf"it is old; nearest valid: precision .*{nearest}"):
            enable_fp8(model, stage(precision), model.vision_model.decoder.pg_collection)
    assert enable_fp8(model, stage("bf16"), model.vision_model.decoder.pg_collection) is None
