"""Recompute changes what is kept for the backward pass, and not one bit of a gradient."""

import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_vl.config.schema import RecomputeConfig, StageConfig
from megatron_vl.config.schema_model import LAYER_KINDS, LayerKind
from megatron_vl.data.pack import Pack
from megatron_vl.engine import recompute
from megatron_vl.engine.recompute import mark_decoder, mark_encoder
from megatron_vl.model.vlm import VisionLanguageModel
from tests.conftest import LAPTOP
from tests.support.gradients import batch_gradients, whole
from tests.support.memory import SavedBytes
from tests.support.packs import pack_of_documents, picture_documents, run_pack
from tests.support.ranks import RankPool

LENGTHS, TILES = (70, 58, 90, 38), (2, 1, 0, 1)
PATTERN = "M-M*-MM-"
KINDS = [kind.value for kind in LayerKind]
ALL = ["recompute.decoder=8", "recompute.encoder=4"]
SETTINGS = {
    **{
        kind.value: ["recompute.decoder=8", f"recompute.kinds=[{kind.value}]"] for kind in LayerKind
    },
    "all": ["recompute.decoder=8", "recompute.encoder=4"],
    "some-layers": ["recompute.decoder=3", "recompute.encoder=2"],
}
LAYOUTS = {
    "TP2-SP": ["parallel.tensor=2", "parallel.sequence=true"],
    "PP2": ["parallel.pipeline=2"],
    "TP2-SP-fp8": ["parallel.tensor=2", "parallel.sequence=true", "precision=fp8_delayed"],
}


@pytest.fixture(scope="module")
def pack(config: StageConfig) -> Pack:
    generator = torch.Generator().manual_seed(61)
    return pack_of_documents(config, *picture_documents(config, LENGTHS, TILES, generator))


@pytest.fixture
def training(model: VisionLanguageModel) -> Iterator[VisionLanguageModel]:
    """The model in training mode, nothing marked and nothing frozen, before and after."""

    def restore(mode: bool) -> None:
        model.train(mode)
        model.zero_grad()
        model.requires_grad_(True)
        mark(model, 0, 0)

    restore(True)
    yield model
    restore(False)


def mark(model: VisionLanguageModel, decoder: int, encoder: int, *kinds: LayerKind) -> None:
    config = RecomputeConfig(decoder, encoder, list(kinds or LayerKind))
    stack = model.language_model.decoder
    mark_decoder(stack.layers, stack.layer_type_list, config)
    mark_encoder(model.vision_model.decoder.layers, config)


def backward(model: VisionLanguageModel, pack: Pack) -> dict[str, Tensor]:
    """Gradients of the summed, unevenly weighted losses."""
    model.zero_grad()
    losses_L = run_pack(model, pack, with_labels=True)
    (losses_L * torch.linspace(0.1, 2, len(losses_L))).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def kept(model: VisionLanguageModel, pack: Pack) -> int:
    """Bytes kept for the backward pass, parameters aside."""
    with SavedBytes(model.parameters()) as saved:
        losses_L = run_pack(model, pack, with_labels=True)
    total = saved.total
    del losses_L
    return total


def layer_passes(model: VisionLanguageModel, run: Callable[[], Any]) -> Counter[str]:
    """How often each decoder or encoder layer ran."""
    passes: Counter[str] = Counter()
    watched = {
        f"{part}.{number}": layer
        for part, stack in (
            ("decoder", model.language_model.decoder),
            ("encoder", model.vision_model.decoder),
        )
        for number, layer in enumerate(stack.layers)
    }
    handles = [
        # Every layer begins with a fused norm and linear; a hook there sees each pass.
        first_linear(layer).register_forward_pre_hook(
            lambda module, args, name=name: passes.update([name])
        )
        for name, layer in watched.items()
    ]
    run()
    for handle in handles:
        handle.remove()
    return passes


def first_linear(layer: nn.Module) -> nn.Module:
    names = ("in_proj", "linear_qkv", "linear_fc1")
    return next(m for name, m in layer.named_modules() if name.endswith(names))


@pytest.mark.parametrize(
    ("decoder", "encoder", "kinds"),
    [(8, 0, [kind]) for kind in LayerKind] + [(0, 4, []), (3, 2, list(LayerKind))],
)
def test_gradients_are_bitwise_those_without(
    training: VisionLanguageModel, pack: Pack, decoder: int, encoder: int, kinds: list[LayerKind]
) -> None:
    """Each kind of layer alone, the encoder alone, and the first layers of both."""
    expected = backward(training, pack)
    assert len(expected) == len(list(training.parameters()))
    mark(training, decoder, encoder, *kinds)
    found = backward(training, pack)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("layout", "setting"),
    [
        pytest.param(layout, setting, marks=() if setting == "all" else pytest.mark.slow)
        for layout in LAYOUTS
        for setting in SETTINGS
    ],
)
def test_ranks_have_bitwise_the_gradients_without(
    ranks: RankPool, layout: str, setting: str
) -> None:
    file, names = LAPTOP / "stage1.yaml", ["pictures", "text"]
    common = ["data.sequence_length=256", "parallel.data=1", *LAYOUTS[layout]]
    plain = ranks.run(2, batch_gradients, file, common, names)
    again = ranks.run(2, batch_gradients, file, [*common, *SETTINGS[setting]], names)
    assert [rank.loss for rank in again] == [rank.loss for rank in plain]
    expected, found = whole(plain), whole(again)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("kind", LayerKind, ids=lambda kind: kind.value)
def test_each_kind_keeps_its_input_alone(
    training: VisionLanguageModel, pack: Pack, kind: LayerKind
) -> None:
    layers = [LAYER_KINDS[symbol] for symbol in PATTERN]
    before = kept(training, pack)
    mark(training, len(PATTERN), 0, kind)
    after = kept(training, pack)
    hidden = 4 * sum(LENGTHS) * training.config.hidden_size
    # Without recompute a layer keeps its input, the normed input, and what is inside it.
    assert before - after > layers.count(kind) * 2 * hidden


def test_with_all_layers_marked_the_inputs_of_layers_are_most_of_what_is_kept(
    training: VisionLanguageModel, pack: Pack
) -> None:
    before = kept(training, pack)
    mark(training, len(PATTERN), 4)
    after = kept(training, pack)
    vision = training.vision_model.config
    tokens = len(pack.grids) * (pack.grids[0].patches + training.vision_model.class_token.shape[0])
    inputs = 4 * sum(LENGTHS) * training.config.hidden_size * len(PATTERN)
    inputs += 4 * tokens * vision.hidden_size * vision.num_layers
    # Besides: the projector, the last norm, the loss, patches and embeddings.
    assert inputs < after < 1.8 * inputs
    assert after < before / 4


def test_marked_layers_and_no_others_run_twice(training: VisionLanguageModel, pack: Pack) -> None:
    mark(training, 5, 2, LayerKind.mlp, LayerKind.attention)
    passes = layer_passes(training, lambda: backward(training, pack))
    expected = {f"decoder.{i}": 2 if i in (1, 3, 4) else 1 for i in range(8)}
    expected |= {f"encoder.{i}": 2 if i < 2 else 1 for i in range(4)}
    assert passes == expected


def test_a_frozen_encoder_keeps_nothing_and_runs_once(
    training: VisionLanguageModel, pack: Pack
) -> None:
    training.vision_model.requires_grad_(False)
    mark(training, 8, 0)
    plain = kept(training, pack)
    mark(training, 8, 4)
    assert kept(training, pack) == plain
    passes = layer_passes(training, lambda: backward(training, pack))
    assert {name: n for name, n in passes.items() if name.startswith("encoder")} == {
        f"encoder.{i}": 1 for i in range(4)
    }
    kept_of_encoder = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        kept_of_encoder.append(hidden.requires_grad)

    handles = [x.register_forward_hook(note) for x in training.vision_model.decoder.layers]
    run_pack(training, pack, with_labels=True)
    for handle in handles:
        handle.remove()
    assert kept_of_encoder == [False] * 4


@pytest.mark.parametrize("why", ["no-grad", "nothing-learns"])
def test_nothing_is_set_up_where_no_gradient_is_asked_for(
    training: VisionLanguageModel, pack: Pack, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    def unexpected(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a layer was checkpointed")

    mark(training, 8, 4)
    monkeypatch.setattr(recompute, "torch_checkpoint", unexpected)
    with pytest.raises(AssertionError, match="was checkpointed"):
        run_pack(training, pack, with_labels=True)
    training.requires_grad_(why != "nothing-learns")
    with torch.set_grad_enabled(why != "no-grad"):
        losses_L = run_pack(training, pack, with_labels=True)
    assert losses_L.grad_fn is None


def test_layers_behind_a_frozen_decoder_are_recomputed_for_the_projector(
    training: VisionLanguageModel, pack: Pack
) -> None:
    """Stage 0: gradients pass through frozen layers, which keep less."""
    training.requires_grad_(False)
    training.vision_projection.requires_grad_(True)
    plain, expected = kept(training, pack), backward(training, pack)
    mark(training, 8, 0)
    assert kept(training, pack) < plain / 2
    found = backward(training, pack)
    assert found.keys() == expected.keys()
    assert all(name.startswith("vision_projection.") for name in found)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_in_fp8_under_transformer_engine_its_own_checkpoint_is_used(
    training: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the package: what it is handed runs twice and says which time it is."""
    extension = importlib.import_module("megatron.core.extensions.transformer_engine")
    calls: list[tuple[Any, ...]] = []

    def checkpoint(
        function: Callable[[Tensor], Tensor], distribute: bool, tracker: Any, group: Any, *args: Any
    ) -> Tensor:
        calls.append((distribute, args))
        first = function(*args)
        second = function(*args)
        assert torch.equal(second[0], first[0])
        return second

    monkeypatch.setattr(extension, "te_checkpoint", checkpoint)
    mark(training, 2, 0)
    layer = training.language_model.decoder.layers[1]
    monkeypatch.setattr(layer.config, "fp8", "hybrid")
    hidden_LBH = torch.randn(8, 1, training.config.hidden_size, requires_grad=True)
    passes = layer_passes(training, lambda: layer(hidden_states=hidden_LBH, attention_mask=None))
    assert passes == {"decoder.1": 2}
    ((distribute, (given,)),) = calls
    assert not distribute
    assert given is hidden_LBH


def test_dropout_is_refused(training: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = training.language_model.decoder.layers[0]
    monkeypatch.setattr(layer.config, "hidden_dropout", 0.1)
    with pytest.raises(AssertionError):
        mark(training, 1, 0)
