"""How the processes of a pod, a cluster or one machine find each other."""

import argparse
import importlib.util
import os
from pathlib import Path

from uld_jax.errors import UserError

FLAGS = {
    "coordinator": ("JAX_COORDINATOR_ADDRESS", "HOST:PORT of the first process"),
    "processes": ("JAX_NUM_PROCESSES", "how many there are"),
    "process": ("JAX_PROCESS_ID", "which one this is, from 0"),
}
# Seconds until a process that says nothing is taken for dead, and for all to begin.
HEARTBEAT = 60
START = 300


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --coordinator, --processes, --process and --heartbeat.

    Args:
        parser: Of a command.
    """
    group = parser.add_argument_group(
        "several processes",
        "found without flags on TPU pods, in Slurm jobs (srun), under MPI and in Kubernetes jobs",
    )
    for name, (variable, what) in FLAGS.items():
        group.add_argument(f"--{name}", metavar=name[0].upper(), help=f"{what} (or {variable})")
    group.add_argument(
        "--heartbeat",
        metavar="SECONDS",
        type=int,
        default=HEARTBEAT,
        help=f"after so long without a sign of it a process is taken for dead [{HEARTBEAT}]",
    )


def connect(args: argparse.Namespace) -> None:
    """Joins this process with the others, if there are any; before anything else uses JAX.

    Args:
        args: Parsed flags; without them and their environment variables, what the cluster says.

    Raises:
        UserError: Only some of the flags are given, one has no sense, or the others do not come.
    """
    given = {name: getattr(args, name) or os.environ.get(FLAGS[name][0], "") for name in FLAGS}
    # An address alone, in the environment, is what jax itself looks for in a cluster.
    explicit = bool(given["processes"] or given["process"] or args.coordinator)
    if not explicit and not _in_cluster():
        return
    import jax  # late: `--help` should not wait for it

    from uld_jax.processes import is_first

    # The default of jax for CPUs has no collectives between processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    times = {"heartbeat_timeout_seconds": args.heartbeat, "initialization_timeout": START}
    try:
        if explicit:
            jax.distributed.initialize(**_parsed(given), **times)
        else:
            jax.distributed.initialize(**times)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes did not find each other within {START} s ({reason}): start all of "
            "them, with the same --coordinator and --processes"
        ) from error
    from uld_jax.cli.compose import console

    console.quiet = not is_first()


def _parsed(given: dict[str, str]) -> dict[str, str | int]:
    missing = [f"--{name} (or {FLAGS[name][0]})" for name, value in given.items() if not value]
    if missing:
        raise UserError(f"{', '.join(missing)}: missing, expected with the others of {[*FLAGS]}")
    numbers = {}
    for name in ("processes", "process"):
        if not given[name].isdecimal():
            raise UserError(f"--{name}: expected a number, got {given[name]!r}")
        numbers[name] = int(given[name])
    count, index = numbers["processes"], numbers["process"]
    if index >= count:
        raise UserError(
            f"--process: expected 0 to {count - 1}, for --processes={count}; got {index}"
        )
    host, _, port = given["coordinator"].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator: expected HOST:PORT, got {given['coordinator']!r}")
    return {
        "coordinator_address": given["coordinator"],
        "num_processes": count,
        "process_id": index,
    }


def _in_cluster() -> bool:
    """Whether this is a process that a cluster has started, which jax can ask about the others."""
    devices = (*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*"))
    tpu = devices and importlib.util.find_spec("libtpu")
    slurm = "SLURM_STEP_NODELIST" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1
    mpi = int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    kubernetes = {"JOB_COMPLETION_INDEX", "KUBERNETES_SERVICE_HOST"} <= os.environ.keys()
    return bool(tpu) or slurm or mpi or kubernetes
