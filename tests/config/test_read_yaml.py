"""The fast parser reads what PyYAML's own reads, and errors still show the line they mean."""

from pathlib import Path

import pytest
import yaml

from megatron_vl.config import read_yaml
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.read_yaml import read_mapping
from tests.conftest import REPOSITORY

FILES = sorted((REPOSITORY / "stages").rglob("*.yaml")) + sorted(
    (REPOSITORY / "slurm" / "sites").glob("*.yaml")
)


def test_every_file_of_the_repository_reads_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(FILES) > 20
    fast = [read_mapping(path) for path in FILES]
    monkeypatch.setattr(read_yaml, "Loader", yaml.SafeLoader)
    assert fast == [read_mapping(path) for path in FILES]
    assert [values for values, _ in fast] == [yaml.safe_load(path.read_text()) for path in FILES]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("train:\n  steps: [1, 2\n", "  steps: [1, 2\n"),
        ("name: a\n\tseed: 1\n", "line 2"),
        ("name: 'a\n", "name: 'a"),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("- 1\n", "expected `key: value` lines"),
    ],
)
def test_what_is_not_valid_is_refused_with_its_line(text: str, shown: str, tmp_path: Path) -> None:
    path = tmp_path / "stage.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_mapping(path)
    assert str(path) in str(caught.value)
    assert shown in str(caught.value)
