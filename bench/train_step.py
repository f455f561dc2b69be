"""Measure a training step beside Hugging Face transformers' nemotron_h, in one run.

    python -m bench.train_step            # 10 M parameters, 4 documents of 512 tokens, all cores
    python -m bench.train_step --quick    # 2 documents of 128 tokens, two rounds

Forward, backward and AdamW on the same decoder with the same starting weights and the same tokens:
here as one pack of documents, there as a batch of equally long rows, its torch path. The two sit in
processes of their own and take turns, step by step, so that whatever else the machine does meets
both. Losses must agree, or nothing is said about speed. Times are medians.

`of matmul` is model FLOP/s (`cost/flops.py`) over the rate of a square float32 matrix product,
measured between the steps by the same threads. Memory is the peak of anonymous resident memory
(RssAnon), sampled, over what the process had before it built its model.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from megatron_vl.config.schema import (
    OptimizerConfig,
    Part,
    Precision,
    StageConfig,
    TrainConfig,
)
from megatron_vl.config.schema_data import DataConfig
from megatron_vl.config.schema_model import (
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ProjectorConfig,
)
from megatron_vl.cost.flops import pack_flops
from megatron_vl.cost.parameters import model_parameters

OURS, THEIRS = "megatron_vl", "transformers"
LEARNING_RATE = 1e-3
MATMUL_EDGE = 1024


@dataclass(frozen=True)
class Sizes:
    """documents: of a step. tokens: of each document. rounds: timed steps of each side."""

    documents: int
    tokens: int
    rounds: int
    threads: int


def stage(sizes: Sizes, precision: Precision) -> StageConfig:
    """A decoder of 10 M parameters beside an encoder too small to matter, which stays frozen."""
    return StageConfig(
        name="bench",
        precision=precision,
        model=ModelConfig(
            vocab_size=8192,
            padded_vocab_size=8192,
            decoder=DecoderConfig(
                pattern="M-M-M*-M-M*-M-",
                hidden_size=256,
                ffn_hidden_size=1024,
                num_attention_heads=8,
                num_query_groups=2,
                head_dim=32,
                mamba_num_heads=16,
                mamba_head_dim=32,
                mamba_state_dim=64,
                mamba_num_groups=2,
                mamba_chunk_size=128,
            ),
            encoder=EncoderConfig(
                num_layers=1,
                hidden_size=16,
                ffn_hidden_size=16,
                num_attention_heads=1,
                patch_size=8,
                position_grid=8,
            ),
            projector=ProjectorConfig(ffn_hidden_size=16),
        ),
        data=DataConfig(
            root="none",
            blend={"none": 1.0},
            sequence_length=sizes.documents * sizes.tokens,
            tile_size=64,
        ),
        optimizer=OptimizerConfig(lr=LEARNING_RATE, weight_decay=0.0, clip_grad=1e9),
        train=TrainConfig(trainable=[Part.decoder], steps=1, global_batch=1),
    )


def batch(sizes: Sizes, vocabulary: int) -> Tensor:
    """Tokens (documents, tokens), the same on both sides."""
    generator = torch.Generator().manual_seed(3)
    shape = (sizes.documents, sizes.tokens)
    return torch.randint(40, vocabulary, shape, generator=generator)


def our_steps(sizes: Sizes, precision: Precision) -> Iterator[float]:
    """One optimizer step a value: its loss."""
    from megatron_vl.data.pack import make_pack
    from megatron_vl.engine import process_groups
    from megatron_vl.model.initialize import initialize
    from megatron_vl.sequence.layout import Document
    from megatron_vl.train.build import build_model, prepare_training
    from megatron_vl.train.step import count, train_step

    config = stage(sizes, precision)
    with tempfile.TemporaryDirectory() as folder:
        process_groups.join_world(rank=0, size=1, init_method=f"file://{folder}/world")
        groups = process_groups.create(config.parallel, config.train.seed)
        module = build_model(config, groups)
        initialize(module, groups, config.model, config.train.seed)
        trainee = prepare_training(module, config, groups)
        rows = batch(sizes, config.model.vocab_size)
        turn = torch.zeros(sizes.tokens, dtype=torch.int32).numpy()
        pack = make_pack(
            [Document(row.numpy(), turn) for row in rows],
            [],
            [f"row{number}" for number in range(len(rows))],
            length=rows.numel(),
            patch_size=config.model.encoder.patch_size,
            pad_token=0,
        )
        counts = count([pack], trainee)
        while True:
            yield train_step([pack], counts, trainee, config, LEARNING_RATE).loss


def their_weights(config: StageConfig) -> dict[str, Tensor]:
    """The starting weights under transformers' names."""
    from checkpoint_tools.name_rules import DECODER_PREFIX, name_table
    from megatron_vl.model.initialize import draw_tensor

    found = {}
    for rule in name_table(config.model).rules:
        if rule.part is not Part.decoder:
            continue
        drawn = [_drawn(slot.name, slot.shape, config, draw_tensor) for slot in rule.stored]
        for slot, tensor in zip(rule.published, rule.to_published(drawn), strict=True):
            name = slot.name.removeprefix(DECODER_PREFIX)
            found[name.replace("backbone.", "model.")] = tensor
    return found


def _drawn(name: str, shape: tuple[int, ...], config: StageConfig, draw: Any) -> Tensor:
    drawn: Tensor = draw(name, shape, config.model, config.train.seed)
    return drawn


def their_steps(sizes: Sizes, precision: Precision) -> Iterator[float]:
    """One optimizer step a value: its loss."""
    from bench.nemotron_h import empty_nemotron_h

    config = stage(sizes, precision)
    model = empty_nemotron_h(config.model)
    model.load_state_dict(their_weights(config))
    model = model.to(torch.bfloat16) if precision is Precision.bf16 else model
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0
    )
    rows = batch(sizes, config.model.vocab_size)
    while True:
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield float(loss.detach())


def anonymous_memory() -> float:
    """Anonymous resident memory of this process. [MiB]"""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


def work(pipe: Connection, side: str, sizes: Sizes, precision: Precision) -> None:
    """Answer each message with a step's seconds and loss; at None with the peak memory."""
    torch.set_num_threads(sizes.threads)
    import transformers  # noqa: F401  # both sides pay for the same imports

    import megatron_vl.train.build  # noqa: F401

    before = peak = anonymous_memory()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_memory())

    sampler = threading.Thread(target=sample)
    sampler.start()
    steps = (our_steps if side == OURS else their_steps)(sizes, precision)
    while pipe.recv() is not None:
        began = time.perf_counter()
        loss = next(steps)
        pipe.send((time.perf_counter() - began, loss))
    done.set()
    sampler.join()
    pipe.send(peak - before)


def matmul_flops(threads: int) -> float:
    """FLOP/s of a square float32 matrix product, the best of three."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, MATMUL_EDGE, MATMUL_EDGE)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * MATMUL_EDGE**3 / (time.perf_counter() - began))
    return best


@dataclass(frozen=True)
class Measured:
    """Of one side: median seconds of a step, losses, peak MiB."""

    seconds: float
    losses: list[float]
    memory: float


def compare(sizes: Sizes, precision: Precision) -> tuple[dict[str, Measured], float]:
    """Both sides, step by step in turns, and the matmul rate measured in between. [FLOP/s]"""
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for side in (OURS, THEIRS):
        pipes[side], end = context.Pipe()
        worker = context.Process(target=work, args=(end, side, sizes, precision), daemon=True)
        worker.start()
        end.close()
        workers.append(worker)
    answers: dict[str, list[tuple[float, float]]] = {side: [] for side in pipes}
    rates = []
    try:
        for _ in range(1 + sizes.rounds):
            for side, pipe in pipes.items():
                pipe.send(side)
                answers[side].append(pipe.recv())
            rates.append(matmul_flops(sizes.threads))
        found = {}
        for side, pipe in pipes.items():
            pipe.send(None)
            seconds, losses = zip(*answers[side], strict=True)
            found[side] = Measured(statistics.median(seconds[1:]), list(losses), pipe.recv())
    finally:
        for pipe in pipes.values():
            pipe.close()
        for worker in workers:
            worker.join(timeout=30)
    return found, statistics.median(rates)


def main() -> None:
    """Print a table a precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a trial: small and short")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side")
    options = parser.parse_args()
    sizes = Sizes(4, 512, options.rounds, options.threads)
    if options.quick:
        sizes = Sizes(2, 128, 2, options.threads)
    model = stage(sizes, Precision.fp32).model
    flops = pack_flops(
        model,
        document_lengths=[sizes.tokens] * sizes.documents,
        padded_length=sizes.documents * sizes.tokens,
        grids=[],
        trainable={"decoder"},
    ).total
    millions = model_parameters(model).of_parts({"decoder"}) / 1e6
    print(
        f"{millions:.1f} M parameters, {sizes.documents} documents of {sizes.tokens} tokens, "
        f"{flops / 1e9:.0f} GFLOP a step, {sizes.threads} threads, {sizes.rounds} rounds"
    )
    for precision, tolerance in ((Precision.fp32, 1e-4), (Precision.bf16, 3e-2)):
        found, rate = compare(sizes, precision)
        ours, theirs = found[OURS], found[THEIRS]
        for a, b in zip(ours.losses, theirs.losses, strict=True):
            if abs(a - b) > tolerance * abs(b):
                raise SystemExit(
                    f"{precision.value}: the losses differ, so this is not the same work: "
                    f"{ours.losses} and {theirs.losses}"
                )
        print(f"\n{precision.value}, matmul {rate / 1e9:.0f} GFLOP/s in float32")
        print(f"{'':<14}{'s/step':>9}{'of matmul':>11}{'peak MiB':>10}{'last loss':>11}")
        for side, one in found.items():
            share = flops / one.seconds / rate
            print(
                f"{side:<14}{one.seconds:>9.3f}{share:>11.2f}{one.memory:>10.0f}"
                f"{one.losses[-1]:>11.4f}"
            )
        print(
            f"{OURS} is {theirs.seconds / ours.seconds:.2f} times as fast and takes "
            f"{ours.memory / theirs.memory:.2f} of the memory",
            flush=True,
        )


if __name__ == "__main__":
    main()
