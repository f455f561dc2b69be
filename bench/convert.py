"""Measure export and import of checkpoints beside `cp` and fsync of the same bytes.

    python bench/convert.py                  # 0.1 and 1 GB
    python bench/convert.py --sizes 0.1 1 6  # needs three times the largest size on disk

Random bfloat16 weights of one width and growing depth. Conversions and copies take turns, the best
of three counts; each conversion runs in a fresh process, whose start is not timed and whose
anonymous resident memory (RssAnon) is sampled. Rates count the bytes of the BF16 weights,
also where a quantized export writes fewer. Export compares the checkpoint with its receipt only
on its second line: that reads and hashes every byte once more. Everything written is fsynced by
both.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.import_hf import import_folder
from checkpoint_tools.name_rules import name_table
from checkpoint_tools.published_config import TokenIds, published_config
from checkpoint_tools.published_folder import (
    CONFIG_FILE,
    INDEX_FILE,
    PUBLISHED_TOKENIZER,
    index_text,
    shard_name,
)
from checkpoint_tools.quantized_layout import INPUT_AMAX, Calibration, quantized_modules
from checkpoint_tools.safetensors_file import SafetensorsWriter, TensorSpec
from checkpoint_tools.stage_source import open_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_data import DataConfig
from megatron_vl.config.schema_model import (
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ProjectorConfig,
)
from megatron_vl.data.tokenizer import CONTROL_TOKENS, VISION_TOKENS

ROUNDS = 3
_PATTERN = "M-M-M*-"
_VOCABULARY = 16384
_WIDTH = 1024


def _config(gigabytes: float) -> StageConfig:
    """A model of about so many bytes in bfloat16."""
    layers = max(3, round((gigabytes * 1e9 / 2 - 55e6) / 7.6e6))
    return StageConfig(
        name="bench",
        model=ModelConfig(
            vocab_size=_VOCABULARY,
            padded_vocab_size=_VOCABULARY,
            decoder=DecoderConfig(
                pattern=(_PATTERN * layers)[:layers],
                hidden_size=_WIDTH,
                ffn_hidden_size=4 * _WIDTH,
                num_attention_heads=8,
                num_query_groups=2,
                head_dim=128,
                mamba_num_heads=32,
                mamba_head_dim=64,
                mamba_state_dim=64,
                mamba_num_groups=8,
            ),
            encoder=EncoderConfig(
                num_layers=2,
                hidden_size=384,
                ffn_hidden_size=1536,
                num_attention_heads=6,
                position_grid=32,
            ),
            projector=ProjectorConfig(ffn_hidden_size=2048),
        ),
        data=DataConfig(sequence_length=4096),
    )


def _tokenizer() -> str:
    """A tokenizer.json of the vocabulary's size; what it encodes does not matter here."""
    words = [*CONTROL_TOKENS, *(f"w{i}" for i in range(_VOCABULARY)), *VISION_TOKENS]
    words = [*words[: _VOCABULARY - len(VISION_TOKENS)], *VISION_TOKENS]
    special = {*CONTROL_TOKENS, *VISION_TOKENS}
    return json.dumps(
        {
            "added_tokens": [
                {"id": i, "content": w, "special": True, "single_word": False, "lstrip": False,
                 "rstrip": False, "normalized": False}
                for i, w in enumerate(words) if w in special
            ],
            "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)},
                      "unk_token": "<unk>"},
        }
    )  # fmt: skip


def _weights(spec: TensorSpec, generator: np.random.Generator) -> torch.Tensor:
    """Random bfloat16 numbers between 2^-7 and 2^-5, of either sign, made in no time."""
    bits = generator.integers(0, 1 << 64, -(-spec.num_bytes // 8), dtype=np.uint64)
    drawn = torch.from_numpy(bits.view(np.int16))[: math.prod(spec.shape)]
    drawn.bitwise_and_(-0x7F01).bitwise_or_(0x3C00)
    return drawn.view(torch.bfloat16).reshape(spec.shape)


def _write_published(folder: Path, stage: StageConfig) -> int:
    """A published folder of random weights; returns the bytes of its tensors."""
    folder.mkdir()
    generator = np.random.Generator(np.random.SFC64(0))
    slots = name_table(stage.model).published()
    specs = {name: TensorSpec(torch.bfloat16, slot.shape) for name, slot in slots.items()}
    writer = SafetensorsWriter(folder / shard_name(0, 1), specs)
    for name, spec in specs.items():
        writer.write(name, _weights(spec, generator))
    writer.finish()
    ids = TokenIds(begin=1, end_of_turn=12, pad=0, image=_VOCABULARY - 10, video=_VOCABULARY - 1)
    config = published_config(stage, _VOCABULARY, "bfloat16", ids)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    record: dict[str, dict[str, Any]] = {name: {} for name in specs}
    (folder / INDEX_FILE).write_text(index_text({shard_name(0, 1): record}, specs))
    (folder / PUBLISHED_TOKENIZER).write_text(_tokenizer())
    return sum(spec.num_bytes for spec in specs.values())


def _anonymous() -> int:
    """Anonymous resident memory of this process, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def _measured(connection: Any, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """In a fresh process: seconds of a call and the peak of anonymous memory during it."""
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], _anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    function(*arguments)
    seconds = time.perf_counter() - start
    stop.set()
    sampler.join()
    connection.send((seconds, peak[0]))


def _fresh(function: Callable[..., None], *arguments: Any) -> tuple[float, int]:
    # Its server has imported everything and done nothing, so a process of it starts at once.
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measured, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def _import(folder: Path, out: Path) -> None:
    import_folder(folder, out, None, 0, lambda progress: None)


def _export(
    path: Path, out: Path, check: bool, kind: str = "bf16", amax: Path | None = None
) -> None:
    options = ExportOptions(kind, check_digest=check, amax=amax)
    export(path, out, options, lambda progress: None)


def _amax(stage: Path, path: Path) -> None:
    """An amax file with 1 for every module: what it says does not change the work."""
    source = open_stage(stage)
    names = [module + INPUT_AMAX for module in quantized_modules(source.table.rules)]
    specs = {name: TensorSpec(torch.float32, ()) for name in names}
    writer = SafetensorsWriter(path, specs, Calibration(source.digest, 1, 1, 0).metadata())
    for name in names:
        writer.write(name, torch.ones(()))
    writer.finish()


def _copy(source: Path, out: Path) -> tuple[float, int]:
    """`cp` of a folder, then fsync of every file."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    for path in out.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.perf_counter() - start, 0


def _bench(gigabytes: float, base: Path) -> None:
    random, published, stage, out = (base / name for name in ("random", "hf", "stage", "out"))
    size = _write_published(random, _config(gigabytes))
    _fresh(_import, random, stage)
    shutil.rmtree(random)
    _fresh(_export, stage, published, False)  # the same, with recorded hashes
    amax = base / "amax.safetensors"
    _amax(stage, amax)
    runs: dict[str, Callable[[], tuple[float, int]]] = {
        "cp + fsync": lambda: _copy(published, out),
        "import": lambda: _fresh(_import, published, out),
        "export": lambda: _fresh(_export, stage, out, False),
        "export, receipt checked": lambda: _fresh(_export, stage, out, True),
        "export fp8": lambda: _fresh(_export, stage, out, False, "fp8", amax),
        "export nvfp4": lambda: _fresh(_export, stage, out, False, "nvfp4", amax),
    }
    best: dict[str, tuple[float, int]] = {}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            seconds, peak = run()
            shutil.rmtree(out)
            os.sync()
            before = best.get(name, (float("inf"), 0))
            best[name] = (min(seconds, before[0]), max(peak, before[1]))
    copied = best["cp + fsync"][0]
    for name, (seconds, peak) in best.items():
        memory = f"{peak / 1e9:5.2f} GB" if peak else "       -"
        print(
            f"{size / 1e9:5.2f} GB  {name:24} {seconds:7.2f} s  {size / 1e9 / seconds:5.2f} GB/s  "
            f"{copied / seconds:5.2f} of cp  {memory}",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 1.0], metavar="GB")
    parser.add_argument("--folder", help="where to write; default: the temporary folder")
    args = parser.parse_args()
    print("    size  what                        best       rate        ratio  peak anonymous")
    for gigabytes in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.folder) as base:
            _bench(gigabytes, Path(base))


if __name__ == "__main__":
    main()
