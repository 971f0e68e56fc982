#!/usr/bin/env python3
"""Runs uld-jax as several processes on this machine, each with some CPU devices of its own.

launch/local_multiprocess.py --processes=2 --devices=4 -- train --config=FILE.py --workdir=DIR

It shows on a laptop what a pod will do: the processes find each other over a coordinator, share a
mesh and write one workdir. SIGTERM and SIGINT go to all of them; once one has failed, the others
have --grace seconds. The exit status is that of the first process that failed, else 0.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

LOOK = 0.05


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def commands(processes: int, port: int, arguments: Sequence[str]) -> list[list[str]]:
    """What each process runs.

    Args:
        processes: How many.
        port: Where the first one coordinates.
        arguments: Of uld-jax.

    Returns:
        An argument list each.
    """
    together = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
    program = [sys.executable, "-m", "uld_jax.cli.main", *arguments, *together]
    return [[*program, f"--process={index}"] for index in range(processes)]


def environment(devices: int) -> dict[str, str]:
    """What each process has in its environment besides ours.

    Args:
        devices: CPU devices of a process.

    Returns:
        Variables.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if "host_platform_device_count" not in flag]
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"]),
        # XLA has a thread a device: one that runs two collectives at once would wait for ever.
        "NPROC": os.environ.get("NPROC", "32"),
    }


def show(index: int, lines: IO[str]) -> None:
    """Prints a process's lines as they come, with its number before them."""
    for line in lines:
        print(f"[{index}] {line}", end="", flush=True)


def wait(processes: Sequence[subprocess.Popen[str]], grace: float) -> int:
    """Waits for all; once one has failed, kills those that are left after a time.

    Args:
        processes: Running.
        grace: Seconds that the others have.

    Returns:
        The exit status of the first that failed, 128 + N for one that signal N ended; else 0.
    """
    failed, deadline = 0, float("inf")
    waiting = list(processes)
    while waiting:
        for process in [each for each in waiting if each.poll() is not None]:
            waiting.remove(process)
            code = process.returncode
            if code and not failed:
                failed = code if code > 0 else 128 - code
                deadline = time.monotonic() + grace
        if time.monotonic() > deadline:
            for process in waiting:
                process.kill()
        time.sleep(LOOK)
    return failed


def main(argv: Sequence[str]) -> int:
    """Starts the processes and waits for them.

    Args:
        argv: See --help.

    Returns:
        The exit status.
    """
    own, found, rest = list(argv), "--" in argv, []
    if found:
        own, rest = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=4, help="CPU devices of each process")
    parser.add_argument("--grace", type=float, default=120.0, help="seconds after a failure")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    args = parser.parse_args(own)
    if not rest or min(args.processes, args.devices) < 1:
        parser.error("expected --processes and --devices of at least 1, then -- and a command")
    own_environment = environment(args.devices)
    programs = commands(args.processes, free_port(), rest)
    if args.dry_run:
        given = [f"{name}={value}" for name, value in own_environment.items()]
        print("\n".join(shlex.join(["env", *given, *program]) for program in programs))
        return 0
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [
        subprocess.Popen(program, env=os.environ | own_environment, **pipes) for program in programs
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, frame: [each.send_signal(signum) for each in running])
    readers = [
        threading.Thread(target=show, args=(index, process.stdout))
        for index, process in enumerate(running)
    ]
    for reader in readers:
        reader.start()
    status = wait(running, args.grace)
    for reader in readers:
        reader.join()
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
