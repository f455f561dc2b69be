"""Wall time against saves and the signal before the limit, for `mvl plan`. Arithmetic alone."""

from collections.abc import Sequence

from launch.site_schema import SiteConfig
from launch.slurm.shape import Measured, lead_seconds
from launch.tables import print_table
from megatron_vl.config.schema import StageConfig
from megatron_vl.run.stop import seconds_to_stop


def step_seconds(config: StageConfig, site: SiteConfig) -> float | None:
    """One step at the tokens a second that the site states; None where it states none."""
    rate = site.tokens_per_s.get(config.name, site.tokens_per_s.get("default"))
    if rate is None:
        return None
    tokens = config.train.global_batch * config.data.sequence_length
    return tokens / (rate * config.parallel.ranks)


def stop_problem(config: StageConfig, site: SiteConfig, took: Measured | None) -> str | None:
    """What is wrong where the warning comes too late for a step and a save to end in time."""
    step = took.step_seconds if took else step_seconds(config, site)
    if step is None:
        return None
    save = took.save_seconds if took else site.time.save_seconds
    needed, lead = seconds_to_stop(save, step), lead_seconds(site, took)
    if needed <= lead:
        return None
    return (
        f"{config.name}: stopping takes up to {needed:.0f} s (twice a step of {step:.0f} s and a "
        f"save of {save:.0f} s), the warning comes {lead} s before the limit; nearest valid: "
        f"time.lead_seconds {-(-int(needed) // 60) * 60}"
    )


def print_time(
    stages: Sequence[StageConfig], site: SiteConfig, measured: dict[str, Measured | None]
) -> None:
    """A table of steps, saves and what a failure costs, where the site states a rate."""
    rows = []
    for config in stages:
        took = measured.get(config.name)
        step = took.step_seconds if took else step_seconds(config, site)
        if step is None:
            continue
        save = took.save_seconds if took else float(site.time.save_seconds)
        between = config.checkpoint.every or config.train.steps
        rows.append(
            (
                config.name,
                f"{step:,.1f} s",
                f"{save:,.0f} s" + "*" * (took is not None),
                f"{seconds_to_stop(save, step):,.0f} s",
                f"{lead_seconds(site, took)} s",
                f"{between:,} steps" if config.checkpoint.every else "at the end",
                f"{between * step / 60:,.0f} min",
                f"{100 * save / (between * step + save):.1f} %",
            )
        )
    if not rows:
        return
    names = ("stage", "step", "save", "stop needs", "warning", "saves every", "lost at most")
    print_table("wall time against saves", (*names, "in saves"), rows, left=1)
