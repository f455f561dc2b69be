"""Damaged published folders and checkpoints: each caught, and named."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.explain import explain
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.import_hf import import_folder
from checkpoint_tools.names import NamesError
from checkpoint_tools.published_folder import (
    CHECKSUMS_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    PUBLISHED_TOKENIZER,
)
from megatron_vl.engine.checkpoint_trust import UntrustedCheckpointError
from tests.checkpoint_tools.conftest import Published, quiet
from tests.checkpoint_tools.published import read_all, tokenizer_text

CLASS_TOKEN = "vision_model.radio_model.model.patch_generator.cls_token.token"
Damage = Callable[[Path], None]


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(release, folder)
    return folder


def refuse(folder: Path, *words: str) -> str:
    """Import the folder; the message, which holds the words."""
    out = folder.parent / "imported"
    with pytest.raises((ConversionError, NamesError)) as raised:
        import_folder(folder, out, None, 1, quiet)
    assert not out.exists()
    for word in words:
        assert word in str(raised.value), str(raised.value)
    return str(raised.value)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def without_checksums(folder: Path) -> None:
    """As folders of others come: only names, shapes and files can be checked."""
    (folder / CHECKSUMS_FILE).unlink()


def drop(path: Path) -> str:
    """Write a shard anew without its last tensor; the tensor's name."""
    held = load_file(path)
    name = list(held)[-1]
    del held[name]
    save_file(held, path, metadata={"format": "pt"})
    return name


def flip(path: Path) -> str:
    """Flip one bit of a tensor in the middle of a file; the tensor's name."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    name = sorted(header, key=lambda n: header[n]["data_offsets"])[len(header) // 2]
    data[8 + length + header[name]["data_offsets"][0] + 1] ^= 4
    path.write_bytes(bytes(data))
    return name


def test_a_dropped_tensor(copy: Path) -> None:
    name = drop(shards(copy)[1])
    refuse(copy, f"says that {shards(copy)[1].name} holds {name}, but it does not")


def test_a_tensor_dropped_from_index_and_shard(copy: Path) -> None:
    name = drop(shards(copy)[1])
    index = json.loads((copy / INDEX_FILE).read_text())
    del index["weight_map"][name]
    (copy / INDEX_FILE).write_text(json.dumps(index))
    refuse(copy, CHECKSUMS_FILE, name, "dropped")
    without_checksums(copy)
    refuse(copy, f"missing: {name}")


def test_swapped_shards(copy: Path) -> None:
    first, second = shards(copy)[:2]
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)
    refuse(copy, first.name, "swapped")


def test_a_truncated_index(copy: Path) -> None:
    text = (copy / INDEX_FILE).read_text()
    (copy / INDEX_FILE).write_text(text[: len(text) // 2])
    refuse(copy, INDEX_FILE, "cannot be read as JSON")


def test_a_missing_shard(copy: Path) -> None:
    shards(copy)[2].unlink()
    refuse(copy, "names model-00003-of", "which is missing")


def test_a_truncated_shard(copy: Path) -> None:
    path = shards(copy)[0]
    path.write_bytes(path.read_bytes()[:-3])
    refuse(copy, path.name, "cut off")


class Explodes:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_a_pickle_where_a_shard_should_be(copy: Path, tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "unpickled"
    buffer = io.BytesIO()
    value = Explodes(mark)
    if kind == "pickle":
        pickle.dump(value, buffer, protocol=2)
    else:
        torch.save(value, buffer)
    shards(copy)[0].write_bytes(buffer.getvalue())
    refuse(copy, shards(copy)[0].name, "is a pickle", "not opened")
    assert not mark.exists()


def test_a_folder_of_pickles(copy: Path) -> None:
    for path in [*shards(copy), copy / INDEX_FILE]:
        path.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"anything")
    refuse(copy, "pytorch_model.bin is a pickle and is not opened")


@pytest.mark.parametrize("rows", [8, 17])
def test_a_wrong_number_of_prefix_tokens(copy: Path, rows: int) -> None:
    path = next(path for path in shards(copy) if CLASS_TOKEN in load_file(path))
    held = load_file(path)
    held[CLASS_TOKEN] = torch.randn(rows, 48)
    save_file(held, path, metadata={"format": "pt"})
    without_checksums(copy)
    refuse(copy, f"[{rows}, 48], expected [16, 48]", "model.encoder.num_prefix_tokens")


def test_a_config_of_other_prefix_tokens(copy: Path) -> None:
    config = json.loads((copy / CONFIG_FILE).read_text())
    config["vision_config"]["num_registers"] -= 8
    (copy / CONFIG_FILE).write_text(json.dumps(config))
    refuse(copy, f"{CLASS_TOKEN} is [16, 48], expected [8, 48]")


def test_a_flipped_bit_is_found_by_its_hash(copy: Path) -> None:
    name = flip(shards(copy)[1])
    refuse(copy, f"{name} is not what its recorded SHA-256 says")
    with pytest.raises(ConversionError, match="recorded SHA-256") as raised:
        explain(copy, verify=True)
    assert shards(copy)[1].name in str(raised.value)


def test_a_flipped_bit_in_a_stage_is_found_by_its_digest(
    stage_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(stage_folder, folder)
    path = folder / "checkpoints" / "step_000000" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ConversionError, match=r"is not what .*receipt\.json says"):
        export(folder, tmp_path / "out", ExportOptions(), quiet)
    assert not (tmp_path / "out").exists()
    # What was made of it meanwhile is not what the next attempt goes on with.
    assert not list((tmp_path / "out.partial").glob("[!.]*"))


def test_a_truncated_checkpoint_file(stage_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(stage_folder, folder)
    path = folder / "checkpoints" / "step_000000" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConversionError, match=r"cannot be read where .* lies"):
        export(folder, tmp_path / "out", ExportOptions(check_digest=False), quiet)


def test_an_index_that_would_run_code(stage_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(stage_folder, folder)
    mark = tmp_path / "unpickled"
    index = folder / "checkpoints" / "step_000000" / ".metadata"
    index.write_bytes(pickle.dumps(Explodes(mark)))
    with pytest.raises(UntrustedCheckpointError, match=r"asks for pathlib"):
        export(folder, tmp_path / "out", ExportOptions(check_digest=False), quiet)
    assert not mark.exists()


def test_constants_of_another_model(copy: Path) -> None:
    name = "vision_model.radio_model.input_conditioner.norm_mean"
    path = next(path for path in shards(copy) if name in load_file(path))
    held = load_file(path)
    held[name] = held[name] * 0 + 0.5
    save_file(held, path, metadata={"format": "pt"})
    refuse(copy, f"{name} is [0.5, 0.5, 0.5]")


def test_unit_layer_scales_are_known_and_others_refused(
    published: Published, tmp_path: Path
) -> None:
    """transformers writes them; RADIO has none."""
    from tests.checkpoint_tools.published import write_published

    name = "vision_model.radio_model.model.blocks.1.layer_scale2.lambda1"
    good = {**published.tensors, name: torch.ones(48)}
    folder = write_published(tmp_path / "good", published.stage, good, published.tokenizer)
    import_folder(folder, tmp_path / "out", None, 1, quiet)
    bad = {**published.tensors, name: torch.full((48,), 0.9)}
    refuse(write_published(tmp_path / "bad" / "x", published.stage, bad, published.tokenizer), name)


def test_another_architecture(copy: Path) -> None:
    config = json.loads((copy / CONFIG_FILE).read_text())
    (copy / CONFIG_FILE).write_text(json.dumps(config["llm_config"]))
    refuse(copy, "NemotronHForCausalLM", "assemble")


def test_a_tokenizer_of_another_size(stage_folder: Path, tmp_path: Path) -> None:
    small = json.loads(tokenizer_text(tmp_path))
    small["added_tokens"] = [t for t in small["added_tokens"] if t["content"] != "<video>"]
    path = tmp_path / PUBLISHED_TOKENIZER
    path.write_text(json.dumps(small))
    with pytest.raises(ConversionError, match="511 entries, the model's vocabulary 512"):
        export(stage_folder, tmp_path / "out", ExportOptions(tokenizer=path), quiet)


def test_a_tokenizer_that_cuts_text_in_another_way(stage_folder: Path, tmp_path: Path) -> None:
    other = json.loads(tokenizer_text(tmp_path))
    other["model"]["merges"] = other["model"]["merges"][::-1]
    path = tmp_path / PUBLISHED_TOKENIZER
    path.write_text(json.dumps(other))
    with pytest.raises(ConversionError, match=r"not the tokenizer .* differ in model"):
        export(stage_folder, tmp_path / "out", ExportOptions(tokenizer=path), quiet)
    assert not (tmp_path / "out").exists()


def test_one_matrix_for_embedding_and_output(copy: Path) -> None:
    config = json.loads((copy / CONFIG_FILE).read_text())
    config["llm_config"]["tie_word_embeddings"] = True
    (copy / CONFIG_FILE).write_text(json.dumps(config))
    refuse(copy, "tie_word_embeddings", "two tensors")


def test_the_undamaged_copy_is_imported(copy: Path, published: Published, tmp_path: Path) -> None:
    """So that none of the refusals above comes from the copying."""
    import_folder(copy, tmp_path / "out", None, 1, quiet)
    assert explain(copy, verify=True)["verified"]
    assert read_all(copy).keys() >= published.tensors.keys()
