"""The model card of a release, filled from receipts: nothing in it is typed by hand."""

from typing import Any

from checkpoint_tools.lineage import Ancestor, describe_origin
from checkpoint_tools.published_config import ARCHITECTURE, servable
from checkpoint_tools.stage_source import StageSource
from megatron_vl.config.load import config_hash
from megatron_vl.config.schema import StageConfig
from megatron_vl.cost.parameters import model_parameters
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.versions import versions

_HEAD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

"""

_USE = """```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, enable_thinking=False
)
inputs = processor(images=[image], text=prompt, return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```"""


def model_card(source: StageSource, config: dict[str, Any], num_bytes: int) -> str:
    """The text of README.md.

    Args:
        config: the release's config.json.
        num_bytes: size of its tensors.
    """
    stage = source.config
    sections = [
        _HEAD + f"# {_title(source)}",
        _summary(stage, config, num_bytes),
        "## Use\n\n" + _USE,
        _serving(stage),
        "## Training\n\n" + _training(source.ancestors),
        "## Evaluation\n\n" + _evaluation(source),
        "## Provenance\n\n" + _provenance(source),
    ]
    return "\n\n".join(sections) + "\n"


def _title(source: StageSource) -> str:
    run = RunFolder(source.stage.path.parent.parent)
    if run.exists():
        return f"{run.name}: {source.config.name}"
    return source.stage.path.resolve().name


def _summary(stage: StageConfig, config: dict[str, Any], num_bytes: int) -> str:
    counts = model_parameters(stage.model)
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.by_part().items())
    tile = stage.data.tile_size
    return (
        f"A {ARCHITECTURE} vision-language model: a RADIO encoder, an MLP projector and a hybrid "
        f"Mamba-2/Transformer decoder of {len(stage.model.decoder.pattern)} layers "
        f"(`{stage.model.decoder.pattern}`).\n\n"
        f"- Parameters: {counts.total:,} ({parts}), padding rows of the vocabulary included.\n"
        f"- Weights: {config['torch_dtype']}, {num_bytes / 1e9:.2f} GB.\n"
        f"- Text: {config['llm_config']['vocab_size']} tokens in the vocabulary, up to "
        f"{config['max_sequence_length']} in a sequence.\n"
        f"- Images: tiles of {tile}x{tile} pixels, up to {stage.data.max_tiles} and a thumbnail."
    )


def _serving(stage: StageConfig) -> str:
    if servable(stage.model.encoder):
        return "vLLM has an encoder of these sizes; serve the folder with `--trust-remote-code`."
    return "vLLM cannot build an encoder of these sizes; transformers and this project can."


def _training(ancestors: list[Ancestor]) -> str:
    lines = [
        "| stage | from | learns | steps | tokens | sequence | data |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in ancestors:
        receipt = one.receipt
        parent = receipt.parent.stage if receipt is not None and receipt.parent else "drawn weights"
        if one.origin is not None:
            parent = describe_origin(one.origin)
        data = ", ".join(f"{name} {share:g}" for name, share in one.config.data.blend.items())
        cells = [
            one.name,
            parent,
            ", ".join(receipt.trainable) if receipt is not None else "?",
            str(receipt.step) if receipt is not None else "?",
            f"{one.tokens:,}" if one.tokens is not None else "-",
            str(one.config.data.sequence_length),
            data or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _evaluation(source: StageSource) -> str:
    receipt = source.receipt
    values = {k: v for k, v in receipt.metrics.items() if isinstance(v, float)} if receipt else {}
    if not values:
        return "No measurements are recorded for this checkpoint."
    lines = [f"- {name}: {value:.4f}" for name, value in values.items()]
    gates = receipt.gate.items() if receipt else ()
    return "\n".join([*lines, *(f"- gate {name}: {value}" for name, value in gates)])


def _provenance(source: StageSource) -> str:
    digest = "no receipt names it"
    if source.receipt is not None and source.receipt.checkpoint is not None:
        digest = source.receipt.checkpoint.digest
    made = versions()
    return "\n".join(
        [
            f"- Checkpoint: {source.stage.path.name}/{source.checkpoint.folder.name}, SHA-256 "
            f"digest: {digest}",
            f"- Config hash: {config_hash(source.config)}; data cursor: "
            f"{source.state.data_cursor} packs",
            "- Exported with " + ", ".join(f"{name} {version}" for name, version in made.items()),
            "- SHA-256 of every tensor: checksums.json",
        ]
    )
