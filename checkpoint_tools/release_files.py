"""What a release folder holds beside its weights: code, tokenizer, processors, model card.

The code is `hf_model/` as it stands, and `sequence/grids.py`, which picks the grid of tiles, under
the name the code imports it by. The tokenizer adds no tokens of its own, as in training.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_vl.sequence.grids
from checkpoint_tools import hf_model
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.model_card import model_card
from checkpoint_tools.published_config import ARCHITECTURE, BEGIN, VIDEO, TokenIds
from checkpoint_tools.published_folder import PUBLISHED_TOKENIZER
from checkpoint_tools.stage_source import StageSource
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_data import FrameLabels, Tiling
from megatron_vl.data.chat import TEMPLATE_PATH
from megatron_vl.data.prepare import TOKENIZER_FILE
from megatron_vl.data.tokenizer import (
    END_OF_TURN,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    PAD,
    Tokenizer,
)
from megatron_vl.model.radio import PIXEL_MEAN, PIXEL_STD
from megatron_vl.sequence.visual import PatchGrid

_CODE = ("configuration.py", "modeling.py", "image_processing.py", "processing.py")
_GRIDS = "grids.py"
_SILENT: dict[str, Any] = {"post_processor": None, "truncation": None, "padding": None}
"""What would add or cut tokens, in a tokenizer.json."""


@dataclass(frozen=True)
class ReleaseFiles:
    """A tokenizer that fits a model.

    Attributes:
        tokenizer: text of its tokenizer.json.
        ids: the ids config files name.
    """

    tokenizer: str
    ids: TokenIds

    def write(
        self, folder: Path, source: StageSource, config: dict[str, Any], num_bytes: int
    ) -> None:
        """Write all of them."""
        for name, path in code_files().items():
            shutil.copyfile(path, folder / name)
        shutil.copyfile(TEMPLATE_PATH, folder / "chat_template.jinja")
        (folder / PUBLISHED_TOKENIZER).write_text(self._silent_tokenizer(), encoding="utf-8")
        for name, value in {
            "tokenizer_config.json": _tokenizer_config(config),
            "generation_config.json": self._generation_config(),
            "preprocessor_config.json": _image_config(source.config),
            "processor_config.json": _processor_config(source.config),
        }.items():
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        card = model_card(source, config, num_bytes)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _silent_tokenizer(self) -> str:
        definition = json.loads(self.tokenizer)
        if all(definition.get(key) is None for key in _SILENT):
            return self.tokenizer
        return json.dumps({**definition, **_SILENT}, ensure_ascii=False)

    def _generation_config(self) -> dict[str, Any]:
        return {
            "bos_token_id": self.ids.begin,
            "eos_token_id": self.ids.end_of_turn,
            "pad_token_id": self.ids.pad,
            "do_sample": False,
        }


def code_files() -> dict[str, Path]:
    """The code of a release: name there to file here."""
    code = Path(hf_model.__file__).parent
    return {
        **{name: code / name for name in _CODE},
        _GRIDS: Path(megatron_vl.sequence.grids.__file__),
    }


def gather(source: StageSource, tokenizer: Path | None) -> ReleaseFiles:
    """Find the tokenizer and check that the exported processor does what the stage does.

    Raises:
        ConversionError: no tokenizer, one of another size or other than the stage's own, or image
            handling nobody exports.
    """
    if source.config.data.tiling not in (Tiling.published, Tiling.area_weighted):
        raise ConversionError(
            f"data.tiling is {source.config.data.tiling.value}: the exported image processor cuts "
            "tiles (published or area_weighted) and cannot show whole images"
        )
    places = [
        source.stage.path / TOKENIZER_FILE,
        Path(source.config.data.root) / TOKENIZER_FILE,
    ]
    trained = next((path for path in places if path.is_file()), None)
    found = tokenizer or trained
    if found is None or not found.is_file():
        named = tokenizer or " nor ".join(map(str, places))
        raise ConversionError(f"there is no tokenizer at {named}; name one with --tokenizer")
    text = found.read_text(encoding="utf-8")
    loaded, expected = Tokenizer(text), source.config.model.vocab_size
    if loaded.vocab_size != expected:
        raise ConversionError(
            f"{found} has {loaded.vocab_size} entries, the model's vocabulary {expected}; name the "
            "tokenizer it was trained with (--tokenizer)"
        )
    if trained is not None and found != trained:
        _check_same(found, text, trained)
    return ReleaseFiles(text, TokenIds.of(loaded))


def _check_same(given: Path, text: str, trained: Path) -> None:
    """Raise ConversionError where a tokenizer cuts text in another way than the trained one."""
    own, others = (json.loads(t) for t in (text, trained.read_text(encoding="utf-8")))
    # What makes tokens of text; the rest adds or cuts tokens and is not published.
    keys = sorted({*own, *others} - {*_SILENT, "version"})
    differing = [key for key in keys if own.get(key) != others.get(key)]
    if differing:
        raise ConversionError(
            f"{given} is not the tokenizer the stage was trained with, {trained}: they differ in "
            f"{', '.join(differing)}; leave --tokenizer out"
        )


def file_hashes(folder: Path, skip: set[str]) -> dict[str, str]:
    """SHA-256 of the files of a folder, hidden ones and those in `skip` left out."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.name not in skip and not path.name.startswith(".") and path.name != "progress.json":
            hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def _tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END_OF_TURN,
        "pad_token": PAD,
        "unk_token": PAD,
        "extra_special_tokens": {
            "image_token": IMAGE,
            "image_start_token": IMAGE_START,
            "image_end_token": IMAGE_END,
            "video_token": VIDEO,
        },
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config["max_sequence_length"],
        "processor_class": f"{ARCHITECTURE}_Processor",
    }


_AUTO_MAP = {
    "AutoImageProcessor": f"image_processing.{ARCHITECTURE}_ImageProcessor",
    "AutoProcessor": f"processing.{ARCHITECTURE}_Processor",
}


def _image_config(stage: StageConfig) -> dict[str, Any]:
    edge = stage.data.tile_size // stage.model.encoder.patch_size
    return {
        "image_processor_type": f"{ARCHITECTURE}_ImageProcessor",
        "processor_class": f"{ARCHITECTURE}_Processor",
        "auto_map": _AUTO_MAP,
        "image_size": stage.data.tile_size,
        "max_num_tiles": stage.data.max_tiles,
        "area_weighted": stage.data.tiling is Tiling.area_weighted,
        "use_thumbnail": True,
        "norm_mean": list(PIXEL_MEAN),
        "norm_std": list(PIXEL_STD),
        "tokens_per_tile": PatchGrid(edge, edge).tokens,
    }


def _processor_config(stage: StageConfig) -> dict[str, Any]:
    return {
        "processor_class": f"{ARCHITECTURE}_Processor",
        "auto_map": {"AutoProcessor": _AUTO_MAP["AutoProcessor"]},
        "frame_separator": "\n" if stage.data.video.labels is FrameLabels.newline else "",
    }
