"""Tokens a second of greedy decoding, ours beside transformers' own `generate`, on one export.

    python -m bench.generate [EXPORT] [--prompt-tokens N] [--new-tokens N] [--repeats N]

Both open the same exported folder in float32, read the same random prompt and must say the same
tokens; without EXPORT a random model of 23 M parameters is drawn and exported. Runs alternate, the
fastest counts. Prefill is what the first token takes, decoding the rest: of transformers the time
of an answer less that of one token.

Exits 1 where ours decodes fewer tokens a second.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from torch import nn

from bench.vllm.model import make_stage
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.open_export import open_export
from megatron_vl.data.pack import Pack, make_pack
from megatron_vl.infer.model import OpenModel
from megatron_vl.sequence.layout import UNSUPERVISED, Document

Seconds = tuple[float, float]
"""Of the prefill and of all that follows."""


@contextlib.contextmanager
def some_export(folder: str | None) -> Iterator[Path]:
    """The named folder, or a drawn model's."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="mvl-") as base:
        stage, out = make_stage(Path(base) / "drawn"), Path(base) / "export"
        export(stage, out, ExportOptions("fp32"), lambda progress: None)
        yield out


def text_pack(tokens_L: torch.Tensor) -> Pack:
    """A prompt of text alone."""
    tokens = tokens_L.numpy()
    document = Document(tokens, torch.full_like(tokens_L, UNSUPERVISED).int().numpy(), ())
    return make_pack([document], [], ["prompt"], length=len(tokens), patch_size=16, pad_token=0)


def ours(model: OpenModel, prompt: Pack, count: int) -> tuple[list[int], Seconds]:
    """Greedy tokens, however the model would like to end, and how long they took."""
    started = time.perf_counter()
    decoding = model.decoding(prompt.num_tokens + count)
    tokens = [int(model.known(decoding.prefill(prompt)).argmax())]
    first = time.perf_counter()
    while len(tokens) < count:
        tokens.append(int(model.known(decoding.push(tokens[-1])).argmax()))
    return tokens, (first - started, time.perf_counter() - first)


def theirs(model: nn.Module, tokens_L: torch.Tensor, count: int) -> tuple[list[int], Seconds]:
    """The same of transformers."""
    seconds = []
    for length in (1, count):
        started = time.perf_counter()
        answer_BL = model.generate(  # type: ignore[operator]
            input_ids=tokens_L.unsqueeze(0),
            attention_mask=torch.ones(1, len(tokens_L), dtype=torch.int64),
            max_new_tokens=length,
            min_new_tokens=length,
            eos_token_id=-1,
            do_sample=False,
        )
        seconds.append(time.perf_counter() - started)
    return answer_BL[0, len(tokens_L) :].tolist(), (seconds[0], seconds[1] - seconds[0])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.generate")
    parser.add_argument("export", nargs="?", metavar="EXPORT", help="default: a drawn model")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    count = args.new_tokens
    with some_export(args.export) as folder, open_export(folder) as model:
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        ).eval()
        generator = torch.Generator().manual_seed(3)
        vocabulary = model.config.model.vocab_size
        tokens_L = torch.randint(0, vocabulary, (args.prompt_tokens,), generator=generator)
        pack = text_pack(tokens_L)
        sides: dict[str, Callable[[], tuple[list[int], Seconds]]] = {
            "ours": lambda: ours(model, pack, count),
            "transformers": lambda: theirs(reference, tokens_L, count),
        }
        best: dict[str, Seconds] = {}
        said = {name: run()[0] for name, run in sides.items()}  # and warms both up
        for _ in range(args.repeats):
            for name, run in sides.items():
                _, seconds = run()
                kept = best.get(name, seconds)
                best[name] = (min(kept[0], seconds[0]), min(kept[1], seconds[1]))
        parameters = sum(p.numel() for p in model.module.parameters())
    return report(
        parameters, args.prompt_tokens, count, best, same=said["ours"] == said["transformers"]
    )


def report(
    parameters: int, prompt: int, count: int, best: dict[str, Seconds], *, same: bool
) -> int:
    """The table; 1 where ours is slower."""
    print(
        f"{parameters / 1e6:.1f} M parameters, float32, {torch.get_num_threads()} threads; prompt "
        f"of {prompt} tokens, {count} new ones; tokens {'equal' if same else 'DIFFER'}"
    )
    rates = {name: (count - 1) / seconds[1] for name, seconds in best.items()}
    for name, (first, _) in best.items():
        print(f"{name:12}  first token {first * 1e3:8.1f} ms   {rates[name]:8.1f} tokens/s")
    ratio = rates["ours"] / rates["transformers"]
    print(f"ours decodes {ratio:.2f} times as fast" + ("" if ratio >= 1 else ": MISSED"))
    return 0 if ratio >= 1 and same else 1


if __name__ == "__main__":
    sys.exit(main())
