"""The model card of a release, filled from receipts: nothing in it is typed by hand."""

from typing import Any

from checkpoint_tools.lineage import Ancestor, describe_origin
from checkpoint_tools.published_config import ARCHITECTURE, servable
from checkpoint_tools.quantized_layout import MODELOPT, described
from checkpoint_tools.stage_source import StageSource
from checkpoint_tools.wording import evaluations, numbers_text, other_metrics, size_text
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
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)
content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True, enable_thinking=False
)
inputs = processor(images=[Image.open("picture.png")], text=prompt, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(tokens, skip_special_tokens=True))
```"""

_USE_MODELOPT = """Weights lie in ModelOpt's layout, which vLLM and this project read (`mvl generate
FOLDER --prompt ...`). transformers has no reader for it, and the code here refuses to be loaded
with it; what transformers reads is made with `--layout compressed_tensors`."""


def model_card(source: StageSource, config: dict[str, Any], num_bytes: int) -> str:
    """The text of README.md.

    Args:
        config: the release's config.json.
        num_bytes: size of its tensors.
    """
    stage, chosen = source.config, described(config)
    for_transformers = chosen is None or chosen.layout != MODELOPT
    sections = [
        _HEAD + f"# {_title(source)}",
        _summary(stage, config, num_bytes),
        "## Use\n\n" + (_USE if for_transformers else _USE_MODELOPT),
        _serving(stage, "transformers and this project" if for_transformers else "this project"),
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
    chosen = described(config)
    weights = config["torch_dtype"]
    if chosen is not None:
        weights = f"{chosen.format} ({chosen.layout}) in the decoder's linears, {weights} elsewhere"
    return (
        f"A {ARCHITECTURE} vision-language model: a RADIO encoder, an MLP projector and a hybrid "
        f"Mamba-2/Transformer decoder of {len(stage.model.decoder.pattern)} layers "
        f"(`{stage.model.decoder.pattern}`).\n\n"
        f"- Parameters: {counts.total:,} ({parts}), padding rows of the vocabulary included.\n"
        f"- Weights: {weights}, {size_text(num_bytes)}.\n"
        f"- Text: {config['llm_config']['vocab_size']} tokens in the vocabulary, up to "
        f"{config['max_sequence_length']} in a sequence.\n"
        f"- Images: tiles of {tile}x{tile} pixels, up to {stage.data.max_tiles} and a thumbnail."
    )


def _serving(stage: StageConfig, others: str) -> str:
    if servable(stage.model.encoder):
        return "vLLM has an encoder of these sizes; serve the folder with `--trust-remote-code`."
    return f"vLLM cannot build an encoder of these sizes; {others} can."


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
    metrics = source.receipt.metrics if source.receipt else {}
    losses = evaluations(metrics)
    # A suite's numbers have names like ocr.exact_match; the rest tells how training went.
    suites = {k: v for k, v in other_metrics(metrics).items() if "." in k and isinstance(v, float)}
    if not losses and not suites:
        return "No measurements are recorded for this checkpoint."
    lines = [f"- {name}: {value:.4f}" for name, value in suites.items()]
    if losses:
        lines += ["| loss on | whole | by source | by kind |", "|---|---|---|---|"]
    for name, loss in losses.items():
        whole = f"{loss.whole:.4f}" if loss.whole is not None else "-"
        parts = (numbers_text(loss.source), numbers_text(loss.modality))
        lines.append(f"| {name} | {whole} | {' | '.join(part or '-' for part in parts)} |")
    gates = source.receipt.gate.items() if source.receipt else ()
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
            "- What was checked, where the release was certified: certificate.html",
        ]
    )
