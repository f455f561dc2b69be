"""`mvl submit`, `mvl resume` and `mvl cancel`, on this machine or on a cluster as the site says.

Everything that can be refused is refused before the run folder is made, locked or changed, and
before anything is queued.
"""

import shlex
import sys
from argparse import Namespace
from pathlib import Path

from launch import chain, exit_codes
from launch.graph import Selection, select, stages_of
from launch.lock import RunLock
from launch.rehearsal import write_rehearsal
from launch.site import load_site
from launch.site_schema import Launcher, SiteConfig
from launch.slurm import chain as jobs
from launch.slurm import watch
from launch.slurm.forecast import plan_jobs
from launch.submission import (
    SITE_FILE,
    changed_stages,
    check_data,
    open_recipe,
    outdated_data,
    prepare,
    run_folder,
)
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.recipe import Recipe, load_graph
from megatron_vl.run.folder import RunFolder


def submit(args: Namespace) -> int:
    """Prepare the run folder, then run its stages or queue them."""
    run = run_folder(args.run)
    site = load_site(args.site)
    selection = Selection(args.first, args.last, tuple(args.skip))
    folder = Path(args.recipe)
    if args.rehearse:
        folder = _rehearsal(folder, run, site)
    _, recipe, narrowed = open_recipe(folder, selection, args.overrides)
    names = select(recipe.graph, narrowed)
    configs = stages_of(recipe, names)
    check_data(str(folder), configs)
    for note in outdated_data(str(folder), configs):
        print(f"note: {note}", file=sys.stderr)
    if site.launcher is Launcher.slurm:
        _refuse_on_slurm(run, recipe, names, site)
    lock = RunLock.take(run)
    selected = prepare(folder, run, selection, args.site, args.overrides)
    print(
        f"{run.path}: {len(selected)} of {len(recipe.entries)} stages: {', '.join(selected)}",
        flush=True,
    )
    if site.launcher is Launcher.slurm:
        return _send(run, selected, lock, follow=args.follow)
    run.journal.append("submitted", stages=selected, site=args.site, follow=args.follow)
    return chain.start(run, site.grace_seconds, lock, follow=args.follow)


def _rehearsal(folder: Path, run: RunFolder, site: SiteConfig) -> Path:
    """The recipe to rehearse with instead of a large one. Raises ConfigError."""
    if site.launcher is Launcher.local:
        raise ConfigError("--rehearse tries a cluster; name yours with --site")
    if not folder.is_dir():
        raise ConfigError(f"--rehearse takes a recipe folder, and {folder} is none")
    return write_rehearsal(load_graph(folder), run, site)


def resume(args: Namespace) -> int:
    """Go on with a run as it was planned, from its first stage that is not done or from --from."""
    run = RunFolder(args.run)
    plan = run.plan()
    site = load_site(str(run.path / SITE_FILE))
    selected: list[str] = plan["selected"]
    if args.first is not None:
        first = run.stage(args.first).name
        graph = run.graph()
        selected = [name for name in graph.names if name in (first, *graph.descendants(first))]
    lock = RunLock.take(run)
    if selected != plan["selected"]:
        run.create(plan | {"selected": selected})
    if site.launcher is Launcher.slurm:
        return _send(run, selected, lock, follow=args.follow)
    run.journal.append("submitted", stages=selected, site=plan["site"], follow=args.follow)
    return chain.start(run, site.grace_seconds, lock, follow=args.follow)


def cancel(args: Namespace) -> int:
    """Stop a run and all its processes or jobs; what they have learned is saved."""
    run = RunFolder(args.run)
    if run.plan().get("launcher") == Launcher.slurm.name:
        return watch.cancel(run, at_once=args.now)
    if args.now:
        raise ConfigError("--now is for runs on a cluster; here the grace is the site's")
    return chain.stop(run)


def _refuse_on_slurm(run: RunFolder, recipe: Recipe, names: list[str], site: SiteConfig) -> None:
    """What Slurm or a running job forbids."""
    planned = plan_jobs(recipe, site, run)
    if run.exists():
        jobs.refuse_running(run, changed_stages(run, recipe))
    else:
        jobs.preflight({job.stage: job.script for job in planned if job.stage in names})


def _send(run: RunFolder, selected: list[str], lock: RunLock, *, follow: bool) -> int:
    """Queue the stages and say what was done."""
    try:
        sent = jobs.send(run, selected)
    finally:
        lock.release()
    for name in sent.done:
        print(f"{name}: done before; not run again")
    for name, why in sent.held.items():
        print(f"{name}: no job: {why}")
    for name, job in sent.kept.items():
        print(f"{name}: in the queue already, job {job}")
    for name, job in sent.new.items():
        print(f"{name}: job {job}, {run.stage(name).path / jobs.SCRIPT}")
    for note in sent.notes:
        print(f"note: {note}")
    for name, job in sent.stuck.items():
        print(f"{name}: an administrator holds job {job}; ask for `scontrol release {job}`")
    quoted = shlex.quote(str(run.path))
    if follow and (sent.new or sent.kept):
        return watch.follow(run, selected)
    print(f"watch: mvl status {quoted}    stop: mvl cancel {quoted}")
    return exit_codes.OK if sent.new or sent.kept or not sent.held else exit_codes.HELD
