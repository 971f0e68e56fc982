"""Flags of the commands that score: read by the parser, so nothing here waits for JAX."""

import argparse
from typing import TYPE_CHECKING, Any

from uld_jax.errors import UserError

if TYPE_CHECKING:
    from uld_jax.evaluation import Resampling

# Those of `evaluation.METRICS`, whose module is not for the parser to load.
METRICS = ("f1", "precision", "recall", "em", "rouge1", "rouge2", "rougeL", "rougeLsum")


def add_resampling_flags(command: argparse.ArgumentParser) -> None:
    """Adds how sure to be; `resampling` reads them.

    Args:
        command: A parser.
    """
    group = command.add_argument_group("intervals and p-values", "defaults: evaluation.Resampling")
    for name, what in (
        ("resamples", "of the bootstrap over examples"),
        ("permutations", "of the paired sign-flip test"),
        ("seed", "of both"),
    ):
        group.add_argument(f"--{name}", metavar="N", type=int, help=what)
    group.add_argument("--confidence", metavar="P", type=float, help="of the intervals, as 0.95")


def add_evaluate_flags(command: argparse.ArgumentParser) -> None:
    """Adds what `uld-jax evaluate` scores and what it is compared with.

    Args:
        command: A parser.
    """
    command.add_argument(
        "--model", metavar="SOURCE", help="score this model: a directory, .gguf file or hub id"
    )
    command.add_argument("--predictions", metavar="FILE.jsonl", help="score these answers")
    command.add_argument(
        "--against", metavar="PATH", help="compare with a workdir's or a file's answers"
    )
    command.add_argument(
        "--teacher", action="store_true", help="also how the teacher reads the references"
    )
    _add_bertscore_flag(command)
    command.add_argument(
        "--output",
        metavar="FILE.json",
        help="scores; beside it FILE.jsonl, each example, and FILE.png, the calibration. With it "
        "a killed command goes on when it is given again",
    )
    add_resampling_flags(command)


def _add_bertscore_flag(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--bertscore",
        metavar="MODEL",
        nargs="?",
        const="roberta-large",
        help="also BERTScore by a directory or hub id [roberta-large]; needs the extra bertscore",
    )


def add_report_parser(commands: Any) -> None:
    """Adds the subcommand `report`.

    Args:
        commands: What argparse's add_subparsers returned.
    """
    summary = "compare runs with ULD and without it, in the paper's layout"
    command = commands.add_parser("report", help=summary, description=summary)
    command.add_argument(
        "workdirs",
        metavar="WORKDIR",
        nargs="+",
        help="finished runs: for each with loss.uld_weight > 0 one with 0 and the same seeds",
    )
    command.add_argument(
        "--output", metavar="DIR", required=True, help="gets report.md, report.csv, report.png"
    )
    command.add_argument(
        "--published",
        metavar="FILE.csv",
        help="figures to show beside them: kind, student, dataset, teacher, distil_factor, "
        "data_fraction, f1, ...",
    )
    command.add_argument(
        "--teacher",
        metavar="PATH[,PATH]",
        default="",
        help="also the teachers: their answers to the held-out questions, by `uld-jax generate "
        "--config.generate.split=eval` or as predictions",
    )
    _add_bertscore_flag(command)
    command.add_argument(
        "--metric",
        choices=(*METRICS, "bertscore"),
        default="f1",
        help="of the first table and the plot [f1]",
    )
    add_resampling_flags(command)


def resampling(args: argparse.Namespace) -> "Resampling":
    """How intervals and p-values are made.

    Args:
        args: Parsed flags.

    Returns:
        The options.

    Raises:
        UserError: One is out of range.
    """
    from uld_jax.evaluation import Resampling

    names = ("resamples", "permutations", "confidence", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = Resampling(**given)
    for name, least in (("resamples", 1), ("permutations", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise UserError(f"--{name}={getattr(options, name)}: expected at least {least}")
    if not 0 < options.confidence < 1:
        raise UserError(
            f"--confidence={options.confidence}: expected between 0 and 1, such as 0.95"
        )
    return options
