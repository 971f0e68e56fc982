"""`uld-jax evaluate`: a model's answers to the held-out questions and their scores."""

import argparse
import dataclasses

from rich.table import Table

from uld_jax.cli import compose
from uld_jax.cli.compose import console, say
from uld_jax.files import locate, write_json
from uld_jax.processes import is_first


def run(args: argparse.Namespace) -> None:
    """Scores the run's trained student, or with --config the student it names.

    Args:
        args: Parsed flags.

    Raises:
        UserError: Bad input of any kind.
    """
    config = compose.run_config(args)
    mesh = compose.meshes(config)["student"]
    train_set, eval_set = (compose.load_split(config, split) for split in ("train", "eval"))
    student = compose.load_student(config, args.workdir, mesh)
    result = compose.measure(config, student, train_set, eval_set)
    table = Table("metric", "percent")
    for name, value in result.scores.items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    if args.output and is_first():
        write_json(locate(args.output), dataclasses.asdict(result))
        say(f"scores and answers: {args.output}")
