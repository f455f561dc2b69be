"""What `explain` found, for a reader."""

from collections.abc import Mapping
from typing import Any

from checkpoint_tools.explain import CHECKPOINT
from checkpoint_tools.wording import evaluations, numbers_text, other_metrics, size_text

_DATA = "data/"


def explain_text(known: Mapping[str, Any]) -> str:
    """What is known as text: who made it, how well it did, what it came from, what it holds."""
    lines = [f"{known['kind']} {known['path']}"]
    receipt = known["receipt"]
    if "stage" in known:
        lines.append(
            f"  stage {known['stage']}, step {known['step']}, {known['data_cursor']} packs of its "
            f"data; learns {', '.join(known['trainable']) or 'nothing'}"
        )
    if receipt is None:
        lines.append("  no receipt names it")
    else:
        lines.append(
            f"  run {receipt['run']}: {receipt['status']} ({receipt['reason']}), attempts: "
            f"{receipt['attempts']}, ended {receipt['ended']}"
        )
        lines += [f"  gate {name}: {value}" for name, value in receipt["gate"].items()]
        made = ", ".join(f"{name} {version}" for name, version in receipt["versions"].items())
        lines.append(f"  made with {made}")
    if known.get("digest"):
        said = "made from the checkpoint with digest"
        if known["kind"] == CHECKPOINT:
            said = "digest, verified:" if known["verified"] else "digest as recorded:"
        lines.append(f"  {said} {known['digest']}")
    if "hashes" in known:
        said = "all verified" if known["verified"] else "not verified"
        lines.append(f"  SHA-256 recorded for {known['hashes']} tensors ({said})")
    if receipt is not None and receipt["metrics"]:
        lines += ["", "measured", *_metric_lines(receipt["metrics"])]
    lines += ["", "came from"]
    lines += [line for one in known["lineage"] for line in _stage_lines(one)] or ["  unknown"]
    return "\n".join([*lines, "", "holds", *_tensor_lines(known)])


def _metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    others = other_metrics(metrics)
    numbers = {k: v for k, v in others.items() if isinstance(v, int | float)}
    data = {k: v for k, v in others.items() if k not in numbers}
    lines = [f"  {numbers_text(numbers)}"] if numbers else []
    lines += [f"  {name}: {_value(value)}" for name, value in data.items()]
    losses = evaluations(metrics)
    width = max((len(name) for name in losses), default=0)
    if losses:
        lines.append(f"  {'loss on':{width}}   whole  by source; by kind")
    for name, loss in losses.items():
        whole = f"{loss.whole:7.4f}" if loss.whole is not None else " " * 7
        parts = "; ".join(filter(None, map(numbers_text, (loss.source, loss.modality))))
        lines.append(f"  {name:{width}} {whole}  {parts}".rstrip())
    return lines


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    return str(value)


def _stage_lines(one: Mapping[str, Any]) -> list[str]:
    lines = [f"  {one['stage']} ({one['status']}) from {one['from']}"]
    if one["steps"]:
        tokens = f", {one['tokens']:,} tokens" if one["tokens"] is not None else ""
        lines[0] += (
            f": {one['steps']} steps on {one['packs']} packs of {one['sequence_length']}{tokens}"
        )
        blend = ", ".join(f"{name} {share:g}" for name, share in one["blend"].items())
        lines.append(f"    learned {', '.join(one['trainable']) or 'nothing'}; data {blend}")
    lines += [f"    drawn: {text}" for text in one["drawn"]]
    return lines + [f"    gate {name}: {value}" for name, value in one["gate"].items()]


def _tensor_lines(known: Mapping[str, Any]) -> list[str]:
    tensors = known["tensors"]
    parameters = sum(tensors["parameters"].values())
    parts = ", ".join(f"{name} {count:,}" for name, count in tensors["parameters"].items())
    lines = [
        f"  {tensors['count']} tensors, {_sizes(tensors['bytes_by_dtype'])}",
        f"  {parameters:,} parameters ({parts})",
        f"  decoder {tensors['pattern']}, {tensors['vocabulary']} tokens",
    ]
    state = known.get("training_state")
    if state and state["count"]:
        lines.append(
            f"  training state: {state['count']} tensors, {_sizes(state['bytes_by_dtype'])}"
        )
    return lines


def _sizes(by_dtype: Mapping[str, int]) -> str:
    largest = sorted(by_dtype.items(), key=lambda item: -item[1])
    return ", ".join(f"{size_text(size)} {name}" for name, size in largest)
