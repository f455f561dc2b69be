"""What the last word on one key means for others, when the layers of a stage are put together.

Two rules, both of the kind "a later layer has spoken": whoever sets the steps, tokens or samples of
a stage says how long it is, whatever an earlier layer said; and a key whose switch is turned off
later goes back to its default (see `conditions`). Both leave their reason as the key's origin.
"""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from megatron_vl.config.conditions import CONDITIONS, unread_keys, value_of
from megatron_vl.config.length import LENGTH_KEYS, STATED, STEPS, steps_from
from megatron_vl.config.schema import StageConfig

NOT_READ = "default, not read: "
"""How the origin of a key begins that a later layer has switched off."""


def settle_length(merged: Any, last: Mapping[str, int], origins: dict[str, str]) -> None:
    """Derive `train.steps` where the last layer that speaks of length gives tokens or samples.

    Args:
        merged: the stage as an OmegaConf config; changed.
        last: by key, the last layer that sets it.
        origins: where each key comes from; changed.
    """
    said = [key for key in LENGTH_KEYS if key in last]
    if not said:
        return
    newest = max(last[key] for key in said)
    spoken = [key for key in said if last[key] == newest]
    for key in STATED:
        if key in last and key not in spoken:
            OmegaConf.update(merged, key, 0)
            origins[key] = f"default, {spoken[0]} was set later by {origins[spoken[0]]}"
    if STEPS in spoken:
        return
    sizes = ("train.global_batch", "data.sequence_length")
    if OmegaConf.missing_keys(merged) & set(sizes):
        return  # the missing keys are told first
    batch, length = (max(1, OmegaConf.select(merged, key)) for key in sizes)
    for key in spoken:
        amount = OmegaConf.select(merged, key)
        if amount:
            OmegaConf.update(merged, STEPS, steps_from(key, amount, batch, length).steps)
            origins[STEPS] = f"{origins[key]}, from {key}"
            return


def switch_off(config: StageConfig, last: Mapping[str, int], origins: dict[str, str]) -> None:
    """Put back to its default every unread key whose switch was set in a later layer than it."""
    default = StageConfig()
    for key in list(unread_keys(config)):
        switch = max(CONDITIONS[key].switches, key=lambda name: last.get(name, -1))
        if last.get(key, -1) >= last.get(switch, -1):
            continue  # set beside or after its switch: a contradiction, which the checks refuse
        section, _, name = key.rpartition(".")
        setattr(value_of(config, section), name, value_of(default, key))
        origins[key] = f"{NOT_READ}{switch} was set later by {origins[switch]}"
