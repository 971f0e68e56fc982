"""`uld-jax evaluate`: a model's answers to the held-out questions and their scores."""

import argparse
import dataclasses
from pathlib import Path

from rich.table import Table

from uld_jax.cli import compose
from uld_jax.cli.compose import console, progress_bar
from uld_jax.evaluation import evaluate
from uld_jax.files import write_json
from uld_jax.sharding import make_mesh


def run(args: argparse.Namespace) -> None:
    """Scores the run's trained student, or with --config the student it names.

    Args:
        args: Parsed flags.

    Raises:
        UserError: Bad input of any kind.
    """
    config = compose.run_config(args)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    train_set, eval_set = (compose.load_split(config, split) for split in ("train", "eval"))
    student = compose.load_student(config, args.workdir, mesh)
    with progress_bar("held-out questions", len(eval_set)) as progress:
        result = evaluate(
            student,
            eval_set,
            compose.side_of(config.student, student),
            pool=train_set,
            seed=config.data.seed,
            max_new_tokens=config.eval.max_new_tokens,
            batch_size=config.eval.batch_size,
            progress=progress,
        )
    table = Table("metric", "percent")
    for name, value in result.scores.items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
    if args.output:
        write_json(Path(args.output), dataclasses.asdict(result))
        console.print(f"scores and answers: {args.output}")
