"""The rules between keys that types cannot express, each with the nearest value that keeps it.

Why here and not where a value is used: a rule broken on rank 37 after ten minutes in a queue is a
rule checked too late. Every function returns messages (what was asked, the rule, the nearest valid
value) instead of raising, so that a user reads all of them at once.
"""

import itertools
import math
from collections.abc import Iterator, Mapping

from megatron_vl.config.check_data import check_data, data_ranges
from megatron_vl.config.check_distill import check_distill, distill_ranges
from megatron_vl.config.check_fp8 import check_fp8, fp8_ranges
from megatron_vl.config.check_gate import check_gate
from megatron_vl.config.check_sequence import check_sequence
from megatron_vl.config.check_vision import check_vision
from megatron_vl.config.conditions import check_conditions
from megatron_vl.config.length import check_length
from megatron_vl.config.schema import Part, StageConfig, WeightSource

PATTERN_CHARACTERS = "M-*"
BUILDERS = ("laptop", "none")


def check_stage(config: StageConfig) -> list[str]:
    """Every rule that one stage breaks; empty when it is sound."""
    problems = list(_ranges(config))
    if problems:
        return problems  # the rules below divide by these values
    rules = (
        _shapes, _tensor_split, _pipeline_split, _recompute, check_sequence, _tiles, _batch, _loop,
        check_data, check_vision, check_fp8, check_length, check_conditions, check_distill,
    )  # fmt: skip
    for rule in rules:
        problems += rule(config)
    return problems + check_gate(config.gate)


def check_recipe(
    stages: list[StageConfig], *, whole: bool, parents: Mapping[str, str] | None = None
) -> list[str]:
    """Every rule broken between stages. `whole`: the list starts with a recipe's first stage.

    `parents` names the stage whose checkpoint each takes; None: the one before it in the list.
    """
    problems = []
    names = [stage.name for stage in stages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{names.count(name)} stages are named {name!r}; give each its own name")
    first = stages[0]
    if whole and first.carry.weights is WeightSource.previous:
        problems.append(
            f"{first.name}: carry.weights is previous, but no stage comes before it; "
            "set carry.weights: random"
        )
    if parents is None:
        parents = {stage.name: before.name for before, stage in itertools.pairwise(stages)}
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        if stage.name in parents:
            problems += _handover(by_name[parents[stage.name]], stage)
    return problems


def _handover(before: StageConfig, stage: StageConfig) -> Iterator[str]:
    """What `stage` takes over must fit what `before` leaves behind."""
    if stage.carry.weights is WeightSource.previous and stage.model != before.model:
        yield (
            f"{stage.name}: its model differs from that of {before.name}, whose weights it takes "
            "over; set the model keys in the base file both share, or carry.weights: random"
        )
    if stage.carry.optimizer and set(stage.train.trainable) != set(before.train.trainable):
        yield (
            f"{stage.name}: carry.optimizer needs the trainable parts of {before.name} "
            f"({_names(before.train.trainable)}), it has {_names(stage.train.trainable)}; "
            "set carry.optimizer: false"
        )
    if stage.carry.data_cursor and _data_order(stage) != _data_order(before):
        yield (
            f"{stage.name}: carry.data_cursor goes on in the data order of {before.name}, but "
            f"{_first_difference(before, stage)} differs; set carry.data_cursor: false"
        )


def _data_order(stage: StageConfig) -> dict[str, object]:
    """All that the order of packs depends on; what a pack costs is part of it."""
    return {
        "its data section": stage.data,
        "train.seed": stage.train.seed,
        "train.global_batch": stage.train.global_batch,
        "train.trainable": sorted(part.name for part in stage.train.trainable),
        "its model": stage.model,
    }


def _first_difference(before: StageConfig, stage: StageConfig) -> str:
    one, two = _data_order(before), _data_order(stage)
    return next(name for name in one if one[name] != two[name])


def _ranges(config: StageConfig) -> Iterator[str]:
    """Values that must lie between bounds whatever the other keys say."""
    train, optimizer, parallel = config.train, config.optimizer, config.parallel
    at_least = {
        "parallel.tensor": (parallel.tensor, 1),
        "parallel.pipeline": (parallel.pipeline, 1),
        "parallel.context": (parallel.context, 1),
        "parallel.data": (parallel.data, 1),
        "parallel.first_stage_layers": (parallel.first_stage_layers, 0),
        "recompute.decoder": (config.recompute.decoder, 0),
        "recompute.encoder": (config.recompute.encoder, 0),
        **data_ranges(config),
        **fp8_ranges(config),
        **distill_ranges(config),
        "train.steps": (train.steps, 1),
        "train.tokens": (train.tokens, 0),
        "train.samples": (train.samples, 0),
        "train.global_batch": (train.global_batch, 1),
        "train.seed": (train.seed, 0),
        "train.threads": (train.threads, 0),
        "train.loss_chunk": (train.loss_chunk, 1),
        "train.peak_tflops": (train.peak_tflops, 0),
        "evaluation.every": (config.evaluation.every, 0),
        "evaluation.batches": (config.evaluation.batches, 1),
        "evaluation.packs": (config.evaluation.packs, 0),
        "evaluation.longest_pack": (config.evaluation.longest_pack, 0),
        "checkpoint.every": (config.checkpoint.every, 0),
        "optimizer.weight_decay": (optimizer.weight_decay, 0),
        **_model_sizes(config),
    }
    for key, (value, bound) in at_least.items():
        if not value >= bound:
            yield f"{key} is {value}, must be at least {bound}; nearest valid: {bound}"
    above_zero = {
        "optimizer.lr": (optimizer.lr, "1e-5"),
        "optimizer.epsilon": (optimizer.epsilon, "1e-8"),
        "optimizer.clip_grad": (optimizer.clip_grad, "1.0"),
        "model.decoder.norm_epsilon": (config.model.decoder.norm_epsilon, "1e-5"),
        "model.encoder.norm_epsilon": (config.model.encoder.norm_epsilon, "1e-6"),
        "model.projector.norm_epsilon": (config.model.projector.norm_epsilon, "1e-5"),
        "model.decoder.init_std": (config.model.decoder.init_std, "0.02"),
        "model.encoder.init_std": (config.model.encoder.init_std, "0.02"),
        "model.projector.init_std": (config.model.projector.init_std, "0.02"),
    }
    for key, (value, usual) in above_zero.items():
        if not 0 < value < math.inf:
            yield f"{key} is {value}, must be a number above 0; a usual value: {usual}"
    below_one = {
        "optimizer.beta1": (optimizer.beta1, "0.9"),
        "optimizer.beta2": (optimizer.beta2, "0.999"),
        "optimizer.warmup_fraction": (optimizer.warmup_fraction, "0.1"),
    }
    for key, (value, usual) in below_one.items():
        if not 0 <= value < 1:
            yield f"{key} is {value}, must be at least 0 and below 1; a usual value: {usual}"
    if not 0 <= optimizer.min_lr <= optimizer.lr:
        nearest = 0.0 if not optimizer.min_lr > 0 else optimizer.lr
        yield (
            f"optimizer.min_lr is {optimizer.min_lr}, must lie between 0 and optimizer.lr "
            f"{optimizer.lr}; nearest valid: {nearest}"
        )


def _model_sizes(config: StageConfig) -> dict[str, tuple[float, int]]:
    """The model's sizes, each with its lower bound."""
    model = config.model
    sizes: dict[str, tuple[float, int]] = {"model.vocab_size": (model.vocab_size, 1)}
    sections = {"decoder": model.decoder, "encoder": model.encoder, "projector": model.projector}
    for name, section in sections.items():
        for key, value in vars(section).items():
            if isinstance(value, int):
                bound = 0 if key == "num_prefix_tokens" else 1
                sizes[f"model.{name}.{key}"] = (value, bound)
    return sizes


def _shapes(config: StageConfig) -> Iterator[str]:
    """Sizes inside the model that must fit each other on one rank."""
    model, decoder = config.model, config.model.decoder
    wrong = sorted(set(decoder.pattern) - set(PATTERN_CHARACTERS))
    if wrong or not decoder.pattern:
        what = f"holds {' '.join(map(repr, wrong))}" if wrong else "is empty"
        yield (
            f"model.decoder.pattern {what}; a layer is M (Mamba-2), - (MLP) or * (attention), "
            f"as in {''.join(c for c in decoder.pattern if c in PATTERN_CHARACTERS) or 'M-M*-'!r}"
        )
    groups = [
        ("decoder.num_attention_heads", "decoder.num_query_groups"),
        ("decoder.mamba_num_heads", "decoder.mamba_num_groups"),
        ("encoder.hidden_size", "encoder.num_attention_heads"),
    ]
    for whole, part in groups:
        size, count = _size(config, whole), _size(config, part)
        if size % count:
            yield (
                f"model.{part} is {count}, must divide model.{whole} {size}; nearest valid: "
                f"{nearest_divisor(size, count)}"
            )
    if model.padded_vocab_size < model.vocab_size:
        size = nearest_multiple(model.vocab_size, config.parallel.tensor, up=True)
        yield (
            f"model.padded_vocab_size is {model.padded_vocab_size}, must be at least "
            f"model.vocab_size {model.vocab_size}; nearest valid: {size}"
        )


def _size(config: StageConfig, key: str) -> int:
    """A size by its dotted key under `model`."""
    section, _, name = key.partition(".")
    return vars(vars(config.model)[section])[name]


def _tensor_split(config: StageConfig) -> Iterator[str]:
    """Everything that tensor parallelism cuts must be a multiple of its size."""
    model, tensor = config.model, config.parallel.tensor
    sizes = {
        "model.padded_vocab_size": model.padded_vocab_size,
        "model.decoder.ffn_hidden_size": model.decoder.ffn_hidden_size,
        "model.decoder.num_attention_heads": model.decoder.num_attention_heads,
        "model.decoder.num_query_groups": model.decoder.num_query_groups,
        "model.decoder.mamba_num_heads": model.decoder.mamba_num_heads,
        "model.decoder.mamba_num_groups": model.decoder.mamba_num_groups,
        "model.encoder.num_attention_heads": model.encoder.num_attention_heads,
        "model.encoder.ffn_hidden_size": model.encoder.ffn_hidden_size,
        "model.projector.ffn_hidden_size": model.projector.ffn_hidden_size,
    }
    cut = {key: size for key, size in sizes.items() if size % tensor}
    if not cut:
        return
    fitting = nearest_divisor(math.gcd(*sizes.values()), tensor)
    named = " and ".join(f"{key} is {size}" for key, size in list(cut.items())[:2])
    more = f" ({len(cut)} sizes in all)" if len(cut) > 2 else ""
    raised = " and ".join(f"{key} {nearest_multiple(cut[key], tensor)}" for key in cut)
    other = f", or {raised}" if len(cut) <= 2 else ""
    yield (
        f"parallel.tensor is {tensor}, must divide every size it cuts, but {named}{more}; "
        f"nearest valid: parallel.tensor {fitting}{other}"
    )


def _pipeline_split(config: StageConfig) -> Iterator[str]:
    """How the decoder's layers fall on the pipeline stages."""
    layers, parallel = len(config.model.decoder.pattern), config.parallel
    if parallel.virtual_pipeline != 1:
        yield (
            f"parallel.virtual_pipeline is {parallel.virtual_pipeline}, but megatron-core's hybrid "
            "stack refuses interleaved pipelines; nearest valid: 1"
        )
    first, pipeline = parallel.first_stage_layers, parallel.pipeline
    if first == 0:
        if layers and layers % pipeline:
            yield (
                f"model.decoder.pattern has {layers} layers, which parallel.pipeline {pipeline} "
                f"cannot split evenly; nearest valid: parallel.pipeline "
                f"{nearest_divisor(layers, pipeline)}, or set parallel.first_stage_layers"
                f"{nearest_first_stage(layers, pipeline)}"
            )
    elif pipeline == 1:
        yield (
            f"parallel.first_stage_layers is {first}, but parallel.pipeline is 1 and has no "
            "other stage; nearest valid: 0"
        )
    elif not 0 < first < layers or (layers - first) % (pipeline - 1):
        valid = first_stage_sizes(layers, pipeline)
        nearest = min(valid, key=lambda size: abs(size - first)) if valid else 0
        yield (
            f"parallel.first_stage_layers is {first}, must leave a multiple of {pipeline - 1} of "
            f"the {layers} layers for the other stages; nearest valid: {nearest}"
        )


def first_stage_sizes(layers: int, pipeline: int) -> list[int]:
    """The values of first_stage_layers that leave equal, non-empty stages."""
    return [
        size for size in range(1, layers - pipeline + 2) if (layers - size) % (pipeline - 1) == 0
    ]


def nearest_first_stage(layers: int, pipeline: int) -> str:
    """The first_stage_layers nearest to an even split, after a space; empty where none fits."""
    sizes = first_stage_sizes(layers, pipeline)
    even = layers / pipeline
    return f" {min(sizes, key=lambda size: abs(size - even))}" if sizes else ""


def _recompute(config: StageConfig) -> Iterator[str]:
    """Recompute counts layers that are there."""
    recompute = config.recompute
    layers = {
        "decoder": (recompute.decoder, len(config.model.decoder.pattern)),
        "encoder": (recompute.encoder, config.model.encoder.num_layers),
    }
    for part, (asked, there) in layers.items():
        if asked > there:
            yield (
                f"recompute.{part} is {asked}, but the {part} has {there} layers; nearest valid: "
                f"{there}"
            )
    if recompute.decoder and not recompute.kinds:
        yield (
            f"recompute.decoder is {recompute.decoder}, but recompute.kinds is empty; nearest "
            "valid: recompute.decoder 0, or recompute.kinds [mamba, mlp, attention]"
        )


def _tiles(config: StageConfig) -> Iterator[str]:
    """Tiles must cut into patches, patches into shuffled blocks of 2 x 2."""
    tile, patch = config.data.tile_size, config.model.encoder.patch_size
    grid = config.model.encoder.position_grid
    if tile % (2 * patch):
        yield (
            f"data.tile_size is {tile}, must be a multiple of {2 * patch} (2 patches of "
            f"model.encoder.patch_size {patch}); nearest valid: {nearest_multiple(tile, 2 * patch)}"
        )
    elif tile // patch > grid:
        yield (
            f"data.tile_size {tile} makes {tile // patch} patches a side, more than "
            f"model.encoder.position_grid {grid}; nearest valid: data.tile_size "
            f"{grid // 2 * 2 * patch}, or position_grid {tile // patch}"
        )


def _batch(config: StageConfig) -> Iterator[str]:
    """What is built, and how ranks share a batch."""
    batch, ranks = config.train.global_batch, config.parallel.data
    if batch % ranks:
        yield (
            f"train.global_batch is {batch}, must be a multiple of parallel.data {ranks}; "
            f"nearest valid: train.global_batch {nearest_multiple(batch, ranks)}, or parallel.data "
            f"{nearest_divisor(batch, ranks)}"
        )
    packs = config.evaluation.packs
    if packs % ranks:
        yield (
            f"evaluation.packs is {packs}, must be a multiple of parallel.data {ranks}; nearest "
            f"valid: evaluation.packs {nearest_multiple(packs, ranks)}"
        )
    if config.data.builder not in BUILDERS:
        yield f"data.builder is {config.data.builder!r}, must be one of {', '.join(BUILDERS)}"


def _loop(config: StageConfig) -> Iterator[str]:
    """What is trained and what is carried over."""
    trainable, carry = config.train.trainable, config.carry
    if not trainable:
        yield f"train.trainable is empty, must name at least one of {_names(list(Part))}"
    for key, parts in (("train.trainable", trainable), ("carry.fresh", carry.fresh)):
        if len(set(parts)) < len(parts):
            unique = list(dict.fromkeys(parts))
            yield f"{key} names a part twice; nearest valid: {_names(unique)}"
    frozen = [part for part in carry.fresh if part not in trainable]
    if frozen:
        yield (
            f"carry.fresh draws {_names(frozen)} anew, but train.trainable does not train it; "
            f"nearest valid: train.trainable {_names([*trainable, *frozen])}"
        )
    if carry.weights is WeightSource.random:
        if carry.fresh:
            yield "carry.fresh names parts, but carry.weights random draws all; set carry.fresh: []"
        if carry.optimizer:
            yield (
                "carry.optimizer is true, but carry.weights is random: moments of other weights "
                "mean nothing; set carry.optimizer: false"
            )
    elif carry.optimizer and carry.fresh:
        yield (
            f"carry.optimizer is true, but carry.fresh draws {_names(carry.fresh)} anew, which "
            "has no moments; set carry.optimizer: false"
        )


def nearest_multiple(value: int, factor: int, *, up: bool = False) -> int:
    """The positive multiple of `factor` nearest to `value` (the next one at or above, if `up`)."""
    quotient = -(-value // factor) if up else round(value / factor)
    return max(1, quotient) * factor


def nearest_divisor(whole: int, value: int) -> int:
    """The divisor of `whole` nearest to `value`; of two equally near, the smaller."""
    divisors = (size for size in range(1, whole + 1) if whole % size == 0)
    return min(divisors, key=lambda size: (abs(size - value), size))


def _names(parts: list[Part]) -> str:
    return "[" + ", ".join(part.name for part in parts) + "]"
