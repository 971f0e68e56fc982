"""`uld-jax bench cache`: a cache beside its teacher, on a run's own student and data."""

import argparse
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from uld_jax.benchmark.signals import measure_signals
from uld_jax.cli import compose, devices
from uld_jax.cli.examples import load_split
from uld_jax.cli.teachers import cached_answers
from uld_jax.cli.train import Job, loader_of
from uld_jax.errors import UserError
from uld_jax.train.loop import step_count


def prepare(args: argparse.Namespace, batches: int) -> Callable[[], dict[str, Any]]:
    """Loads student, teachers, data and caches.

    Args:
        args: Parsed flags, with a config whose teachers have teacher.mode=cache.
        batches: How many to measure.

    Returns:
        What measures: see `measure_signals`, with the sizes of the caches as "caches".

    Raises:
        UserError: Bad input of any kind.
    """
    config = compose.run_config(args)
    online = [name for name, each in config.teacher_groups().items() if each.mode != "cache"]
    if online:
        raise UserError(
            f"{online[0]}.mode: expected cache, got {config.teacher_groups()[online[0]].mode!r}; "
            f"set --config.{online[0]}.mode=cache --config.{online[0]}.cache=DIR"
        )
    if config.loss.distance != "uld":
        raise UserError(
            f"loss.distance={config.loss.distance}: expected uld, whose error from a cache is known"
        )
    meshes = devices.meshes(config)
    mesh = meshes["student"]
    train_set = load_split(config, "train")
    teachers = [
        compose.load_model(name, each, mesh) for name, each in config.teacher_groups().items()
    ]
    answers = cached_answers(config, teachers[0], train_set) or {}
    job = Job(
        config,
        Path(),
        meshes,
        compose.load_student(config, None, mesh),
        [*teachers],
        train_set,
        eval_set=[],
    )
    cached = loader_of(job, answers)
    asked = [dataclasses.replace(each, mode="online") for each in config.teachers]
    job.config = dataclasses.replace(config, teacher=asked[0], extra_teachers=tuple(asked[1:]))
    loaders = loader_of(job, answers), cached
    steps = step_count(cached, config)
    if batches > steps:
        raise UserError(f"--batches: expected at most the run's {steps} steps, got {batches}")
    run = partial(
        measure_signals,
        job.student.model,
        [teacher.model for teacher in teachers],
        loaders,
        config,
        mesh=mesh,
        batches=batches,
    )
    names = ("positions", "record_bytes", "bytes", "epsilon", "mean_count", "mean_error")
    manifests = [store.manifest for store in cached.signals if store is not None]
    caches = [{name: manifest[name] for name in names} for manifest in manifests]
    return lambda: run() | {"caches": caches}
