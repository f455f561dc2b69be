"""Reads a site file: `slurm/sites/NAME.yaml`, or any file in that form.

Refuses, naming file, line, key and the nearest valid value: unknown keys, values of a wrong type, a
key that the site's launcher or container runtime would not read, names that a script could not
hold, and secrets written out. All problems come in one error.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.site_schema import Launcher, Runtime, SiteConfig
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.fields import Field, fields_of, nearest_key
from megatron_vl.config.read_yaml import read_mapping

SITES = Path(__file__).resolve().parent.parent / "slurm" / "sites"
_READ_BY_LOCAL = ("launcher", "grace_seconds")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[A-Za-z0-9_.,:@%+/=&|*()\[\]-]*")
_OPTION = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:@%+/=-]+)?")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|CREDENTIAL", re.IGNORECASE)
_PLANNED_OPTIONS = (
    "--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "--time", "--signal", "--export",
    "--output", "--error", "--open-mode", "--job-name", "--comment", "--requeue", "--no-requeue",
    "--dependency", "--partition", "--account", "--qos", "--array", "--wrap",
)  # fmt: skip


@functools.cache
def site_fields() -> dict[str, Field]:
    """Every key of a site file, sections included."""
    return fields_of(SiteConfig)


def load_site(name: str) -> SiteConfig:
    """A site by name (`slurm/sites/NAME.yaml`) or by file. Raises ConfigError."""
    path = site_path(name)
    mapping, lines = read_mapping(path)
    values, problems = _values(mapping, lines, path)
    merged = OmegaConf.structured(SiteConfig)
    fields = site_fields()
    for key, value in values.items():
        try:
            OmegaConf.update(merged, key, value, merge=False)
        except (OmegaConfBaseException, TypeError, ValueError):
            problems.append(
                f"{path}:{lines[key]}: {key} is {value!r}, expected {fields[key].expected}"
            )
    if problems:
        raise ConfigError(problems)
    site = OmegaConf.to_object(merged)
    assert isinstance(site, SiteConfig)
    broken = [f"{path}: {text}" for text in [*_unread(site, values), *_rules(site)]]
    if broken:
        raise ConfigError(broken)
    return site


def site_path(name: str) -> Path:
    """The file that `--site` names. Raises ConfigError when there is none."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else SITES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SITES.glob("*.yaml")))
        raise ConfigError(f"--site {name}: no file {path}; the sites are {known}")
    return path


def _values(
    mapping: dict[str, Any], lines: dict[str, int], path: Path
) -> tuple[dict[str, Any], list[str]]:
    """The values by dotted key, and what is wrong with the keys."""
    fields = site_fields()
    values: dict[str, Any] = {}
    problems: list[str] = []

    def visit(section: dict, prefix: str) -> None:
        for name, value in section.items():
            key = f"{prefix}{name}"
            field = fields.get(key)
            if field is None:
                nearest = nearest_key(key, fields)
                problems.append(
                    f"{path}:{lines[key]}: unknown key {key!r}; the nearest valid key is "
                    f"{nearest!r}"
                )
            elif field.is_section:
                visit(value if isinstance(value, dict) else {}, key + ".")
            else:
                values[key] = value

    visit(mapping, "")
    return values, problems


def _unread(site: SiteConfig, values: dict[str, Any]) -> Iterator[str]:
    """Keys that are set and that nothing would read."""
    if site.launcher is Launcher.local:
        for key in values:
            if key not in _READ_BY_LOCAL:
                yield f"{key} is set, but launcher local reads {' and '.join(_READ_BY_LOCAL)} alone"
    elif "grace_seconds" in values:
        yield "grace_seconds is set, but launcher slurm leaves the kill to Slurm (its KillWait)"
    if site.container.runtime is Runtime.none:
        for key in values:
            if key.startswith("container.") and key != "container.runtime":
                yield f"{key} is set, but container.runtime is none; set it to pyxis or apptainer"


def _rules(site: SiteConfig) -> Iterator[str]:
    """Rules between values that types cannot express."""
    yield from _numbers(site)
    if site.launcher is Launcher.local:
        return
    time, container = site.time, site.container
    if time.limit_minutes * 60 <= time.lead_seconds + time.save_seconds:
        needed = -(-(time.lead_seconds + time.save_seconds + time.start_seconds) // 60)
        yield (
            f"time.limit_minutes is {time.limit_minutes}, which time.lead_seconds "
            f"{time.lead_seconds} and time.save_seconds {time.save_seconds} use up; nearest valid: "
            f"time.limit_minutes {needed + 1}"
        )
    if time.lead_seconds < time.save_seconds:
        yield (
            f"time.lead_seconds is {time.lead_seconds}, too short for a save of time.save_seconds "
            f"{time.save_seconds}; nearest valid: {2 * time.save_seconds}"
        )
    if container.runtime is not Runtime.none and not container.image:
        yield f"container.runtime is {container.runtime.name}, but container.image is empty"
    yield from _names(site)
    yield from _environment(site)


def _numbers(site: SiteConfig) -> Iterator[str]:
    least = {
        "grace_seconds": (site.grace_seconds, 0),
        "job.cpus_per_task": (site.job.cpus_per_task, 0),
        "nodes.tasks": (site.nodes.tasks, 1),
        "nodes.gpus": (site.nodes.gpus, 0),
        "nodes.most": (site.nodes.most, 0),
        "doctor.least_gb_s": (site.doctor.least_gb_s, 0),
        "doctor.least_disk_gb": (site.doctor.least_disk_gb, 0),
        **{f"time.{key}": (value, 1) for key, value in vars(site.time).items()},
        **{f"requeue.{k}": (v, 0) for k, v in vars(site.requeue).items() if k != "enabled"},
    }
    for key, (value, bound) in least.items():
        if not value >= bound:
            yield f"{key} is {value}, must be at least {bound}; nearest valid: {bound}"
    for stage, rate in site.tokens_per_s.items():
        if not rate > 0:
            yield f"tokens_per_s.{stage} is {rate}, must be above 0"


def _names(site: SiteConfig) -> Iterator[str]:
    """Words that go into a script's header, where no quoting holds for every Slurm."""
    words = {f"job.{key}": value for key, value in vars(site.job).items() if isinstance(value, str)}
    words |= {f"job.exclude[{i}]": value for i, value in enumerate(site.job.exclude)}
    for key, value in words.items():
        if not _PLAIN.fullmatch(value):
            yield f"{key} is {value!r}, which holds a character that #SBATCH lines cannot carry"
    for option in site.job.options:
        if not _OPTION.fullmatch(option):
            yield f"job.options holds {option!r}, expected --name or --name=value"
        elif option.partition("=")[0] in _PLANNED_OPTIONS:
            yield (
                f"job.options holds {option}, which `mvl` sets itself; use the key of the site "
                "that stands for it"
            )
    for mount in site.container.mounts:
        parts = mount.split(":")
        if len(parts) not in (2, 3) or not all(part.startswith("/") for part in parts[:2]):
            yield f"container.mounts holds {mount!r}, expected /SRC:/DST or /SRC:/DST:ro"
        elif "," in mount or any(not part.isprintable() for part in parts):
            yield f"container.mounts holds {mount!r}; a comma or line end cannot be passed on"


def _environment(site: SiteConfig) -> Iterator[str]:
    environment = site.environment
    for name in [*environment.set, *environment.export]:
        if not _NAME.fullmatch(name):
            yield f"environment names {name!r}, which no shell takes as a variable's name"
    for name in environment.set:
        if _SECRET.search(name):
            yield (
                f"environment.set.{name} would write a secret into the script; name it in "
                "environment.export, or put it into the file of environment.file (mode 0600)"
            )
    if environment.file and not environment.file.startswith("/"):
        yield f"environment.file is {environment.file!r}, must be an absolute path"
