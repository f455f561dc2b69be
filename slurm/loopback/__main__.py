"""`python3 -m slurm.loopback`: brings a Slurm of this machine up and down; see `cluster.py`."""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from slurm.loopback.cluster import Cluster
from slurm.loopback.packages import ClusterError, fetch_packages

_COMMAND = "python3 -m slurm.loopback"


def main() -> int:
    """Entry point: up, down or packages."""
    args = _parser().parse_args()
    try:
        if args.command == "packages":
            fetch_packages(args.dir)
            print(f"Slurm is in {args.dir}; use it with: {_COMMAND} up --prefix {args.dir}")
        elif args.command == "down":
            cluster = Cluster(args.dir)
            if not cluster.conf.is_file():
                raise ClusterError(
                    f"{args.dir} holds no cluster; name the folder that `up` printed, such as "
                    "${SLURM_CONF%/etc/slurm.conf}"
                )
            cluster.down()
        elif args.command == "keep":
            sys.stdin.read()  # ends when whoever started this has ended
            Cluster(args.dir).down()
        else:
            _up(args)
    except ClusterError as error:
        print(f"loopback: {error}", file=sys.stderr)
        return 1
    return 0


def _up(args: argparse.Namespace) -> None:
    """Start a cluster and print what a shell needs."""
    root = args.dir or Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = Cluster(root, nodes=args.nodes, gpus=args.gpus, prefix=args.prefix)
    cluster.up()
    for name, value in cluster.variables.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"# to end it: {_COMMAND} down {shlex.quote(str(root))}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_COMMAND, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster and print how to use it")
    up.add_argument("dir", nargs="?", type=Path, help="its folder; default: a new one in /tmp")
    up.add_argument("--nodes", type=int, default=4, help="virtual nodes; default: 4")
    up.add_argument("--gpus", type=int, default=8, help="pretended GPUs a node; default: 8")
    up.add_argument("--prefix", type=Path, help="a folder that `packages` made")
    down = commands.add_parser("down", help="end a cluster")
    down.add_argument("dir", type=Path, help="the folder it was started in")
    packages = commands.add_parser("packages", help="fetch Slurm into a folder, without root")
    packages.add_argument("dir", type=Path, help="where to put it, 14 MB")
    keep = commands.add_parser("keep", help="end a cluster at the end of standard input")
    keep.add_argument("dir", type=Path, help="the folder it was started in")
    return parser


if __name__ == "__main__":
    sys.exit(main())
