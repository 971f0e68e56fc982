"""How the processes of a pod, a cluster or one machine find each other, and end together."""

import argparse
import contextlib
import importlib.util
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from uld_jax.errors import Preempted, UserError

FLAGS = {
    "coordinator": ("JAX_COORDINATOR_ADDRESS", "HOST:PORT of the first process"),
    "processes": ("JAX_NUM_PROCESSES", "how many there are"),
    "process": ("JAX_PROCESS_ID", "which one this is, from 0"),
}
# Seconds until a process that says nothing is taken for dead, and for all to begin.
HEARTBEAT = 60
START = 300
# Seconds between two looks at what the others have said, and the most that a process which ends
# waits for them to have heard why.
LOOK = 0.5
LEAVE = 10
# Where they say it: a key each of the coordination service.
FAILED = "uld-jax/failed"


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


class Joined:
    """Joins this process with the others, if there are any, and ends all of them where one fails.

    A process that an error ends says why to the others, which print it and end with status 2
    wherever they are: most of what goes wrong (a file that one machine lacks, a disk that is full)
    they would only notice by waiting for it. Entered before anything else uses JAX.

    Args:
        args: Parsed flags; without them and their environment variables, what the cluster says.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._client: Any = None
        # Held by whoever ends this process, or has brought its command to an end: for good.
        self._ending = threading.Lock()
        self._over = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> None:
        """Connects.

        Raises:
            UserError: Only some of the flags are given, one has no sense, or the others do not
                come.
        """
        if not connect(self._args):
            return
        from jax._src.distributed import global_state  # what jax has beside it are collectives

        self._client, self._number = global_state.client, global_state.process_id
        self._listener.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._client is None:
            return
        self._ending.acquire()  # waits for ever where the listener is about to end this process
        self._over.set()
        self._listener.join(timeout=LEAVE)
        if error is None or isinstance(error, Preempted) or _lost(error):
            return  # which the others know by themselves
        kind_of = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        with contextlib.suppress(RuntimeError):  # where the first process is gone already
            self._client.key_value_set(f"{FAILED}/{self._number}", f"{kind_of}{error}")
        self._leave()

    def _listen(self) -> None:
        failed: list[tuple[str, str]] = []
        while not failed:
            if self._over.wait(LOOK):
                return
            try:
                failed = self._client.key_value_dir_get(FAILED)
            except RuntimeError:
                return  # the first process is gone, of which jax tells
        if not self._ending.acquire(blocking=False):
            return
        name, reason = min(failed)
        where, line = name.rpartition("/")[2], (reason.splitlines() or [""])[0]
        # The command goes on beside this, and a progress bar leaves the cursor within its line.
        print(f"\nerror: process {where}: {line}", file=sys.stderr, flush=True)
        self._leave()
        os._exit(2)

    def _leave(self) -> None:
        """Returns when all have heard of the failure, or will not any more."""
        with contextlib.suppress(RuntimeError):
            self._client.wait_at_barrier("uld-jax: leave", LEAVE * 1000)
        if self._number == 0:
            time.sleep(LOOK)  # it answers the others, and they would report that it is gone


def _lost(error: BaseException) -> bool:
    from uld_jax.processes import is_lost_process

    return isinstance(error, (RuntimeError, ValueError)) and is_lost_process(error)


def connect(args: argparse.Namespace) -> bool:
    """Joins this process with the others, if there are any; before anything else uses JAX.

    Args:
        args: Parsed flags; without them and their environment variables, what the cluster says.

    Returns:
        Whether there are others.

    Raises:
        UserError: Only some of the flags are given, one has no sense, or the others do not come.
    """
    given = {name: getattr(args, name) or os.environ.get(FLAGS[name][0], "") for name in FLAGS}
    # An address alone, in the environment, is what jax itself looks for in a cluster.
    explicit = bool(given["processes"] or given["process"] or args.coordinator)
    if not explicit and not _in_cluster():
        return False
    import jax  # late: `--help` should not wait for it

    from uld_jax.processes import is_first

    # The default of jax for CPUs has no collectives between processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Where nobody answers jax aborts the process: here it has ended before, with a line instead.
    times = {"heartbeat_timeout_seconds": args.heartbeat, "initialization_timeout": 2 * START}
    patience = threading.Timer(START, _give_up)
    patience.start()
    try:
        if explicit:
            jax.distributed.initialize(**_parsed(given), **times)
        else:
            jax.distributed.initialize(**times)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes did not find each other ({reason}): start all of them, with the same "
            "--coordinator and --processes"
        ) from error
    finally:
        patience.cancel()
    from uld_jax.cli.compose import console

    if jax.default_backend() == "cpu":
        # Only the first process would find its programs there, and be ahead of those that compile
        # by more than the 30 s that gloo waits for them.
        jax.config.update("jax_enable_compilation_cache", False)
    console.quiet = not is_first()
    return jax.process_count() > 1


def _give_up() -> None:
    print(
        f"error: the processes did not find each other within {START} s: start all of them, with "
        "the same --coordinator and --processes, where they reach its host and port",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


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
