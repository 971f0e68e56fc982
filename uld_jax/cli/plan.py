"""`uld-jax plan`: whether a run's programs fit a TPU slice, before there is one."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax

from uld_jax import plan as planning
from uld_jax.benchmark.timing import without_compilation_cache
from uld_jax.cli import compose, devices
from uld_jax.cli.compose import console, say
from uld_jax.config import MeshConfig, RunConfig, streaming_devices
from uld_jax.errors import UserError
from uld_jax.files import write_json
from uld_jax.plan import Plan, Slice
from uld_jax.sharding import batch_shards


def run(args: argparse.Namespace) -> None:
    """Compiles the programs for each slice and prints what the compiler knows of them.

    Args:
        args: Parsed flags.

    Raises:
        UserError: Bad input of any kind, or libtpu is missing.
    """
    if args.largest and args.sweep:
        raise UserError("--largest and --sweep: expected one of them, got both")
    if args.program != "train" and (args.largest or args.sweep or args.platform != "tpu"):
        raise UserError(
            f"--program={args.program}: --largest, --sweep and --platform=cuda are for the train "
            "step; leave them out"
        )
    # A TPU or GPU that is there is left to those who compute.
    jax.config.update("jax_platforms", "cpu")
    if args.platform == "cuda":
        report = _lower_for_cuda(args)
    else:
        # The time a compilation takes is not that of reading an earlier one.
        with without_compilation_cache():
            report = _plan_slices(args)
    if args.json:
        write_json(Path(args.json), report)


def _plan_slices(args: argparse.Namespace) -> dict[str, Any]:
    slices = [planning.get_slice(name) for name in args.topology.split(",")]
    configs = [
        compose.run_config(args, device_count=len(s.devices), process_count=s.hosts) for s in slices
    ]
    made_of = planning.read_configs(configs[0])
    plans: list[Plan] = []
    left_out: list[str] = []
    for where, config in zip(slices, configs, strict=True):
        found, reasons = _plan_slice(args, config, made_of, where)
        plans += found
        left_out += [f"{where.name}, {reason}" for reason in reasons]
    if len(plans) > 1:
        say("\n".join(planning.table(plans)))
    for reason in left_out:
        say(f"left out: {reason}")
    for path in streaming_devices(configs[0]):
        say(f"{path} streams: its own devices and its program are not planned, its signal is")
    return {"plans": [planning.to_json(plan) for plan in plans], "left_out": left_out}


def _plan_slice(
    args: argparse.Namespace, config: RunConfig, made_of: dict[str, Any], where: Slice
) -> tuple[list[Plan], list[str]]:
    """The plans of one slice, and what was left out."""

    def plans(config: RunConfig) -> list[Plan]:
        mesh = devices.meshes(config, where.devices)["student"]
        job = planning.JOBS[args.program](config, made_of, mesh)
        shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        title = f"{where.name}, {shape}, batch {job.batch_size}"
        with console.status(f"compiling for {title}"):
            found = planning.make_plans(job, where)
        if args.largest or args.sweep:
            say(f"{title}: {'fits' if found[-1].fits else 'does not fit'}")
        return found

    def plan(config: RunConfig) -> Plan:
        [found] = plans(config)
        return found

    if args.program == "cache" and where.hosts > 1:
        raise UserError(
            f"--topology={where.name}: for a cache each host has a teacher of its own; give the "
            "slice of one host, such as v5e:2x2"
        )
    mesh = devices.meshes(config, where.devices)["student"]
    if args.sweep:
        axes = MeshConfig(**mesh.shape, slices=config.mesh.slices)
        config = dataclasses.replace(config, mesh=axes)
        return planning.sweep(config, [*made_of.values()], mesh.size, plan)
    if not args.largest:
        found = plans(config)
        for each in found:
            say("\n".join(planning.lines(each)))
        return found, []
    tried = planning.largest_batch(config, config.train.accumulation * batch_shards(mesh), plan)
    fitting = [found for found in tried if found.fits]
    if fitting:
        say("\n".join(["the largest batch that fits:", *planning.lines(fitting[-1])]))
    else:
        say(f"{where.name}: no batch fits, not even of {tried[0].batch_size}")
    return tried, []


def _lower_for_cuda(args: argparse.Namespace) -> dict[str, Any]:
    if args.largest or args.sweep:
        raise UserError(
            "--largest, --sweep: expected --platform=tpu, for nothing is compiled for CUDA"
        )
    if not args.topology.isdecimal() or int(args.topology) < 1:
        raise UserError(
            f"--topology={args.topology}: expected a number of GPUs with --platform=cuda"
        )
    gpus = int(args.topology)
    config = compose.run_config(args, device_count=gpus, process_count=1)
    if streaming_devices(config):
        raise UserError("--platform=cuda: expected teachers that do not stream (teacher.mode)")
    report = planning.lower_for_cuda(config, planning.read_configs(config), gpus)
    say(
        f"{gpus} CUDA devices: the step lowers, {report['program_lines']:,} lines. It is NOT "
        "compiled: whether it fits is not known, nor how fast it is.\narguments on each GPU: "
        + ", ".join(f"{kind} {planning.size(size)}" for kind, size in report["bytes"].items())
    )
    return report
