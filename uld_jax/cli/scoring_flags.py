"""Flags of the commands that score: read by the parser, so nothing here waits for JAX."""

import argparse
from typing import TYPE_CHECKING

from uld_jax.errors import UserError

if TYPE_CHECKING:
    from uld_jax.evaluation import Resampling


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
    command.add_argument(
        "--bertscore",
        metavar="MODEL",
        nargs="?",
        const="roberta-large",
        help="also BERTScore by a directory or hub id [roberta-large]; needs the extra bertscore",
    )
    command.add_argument(
        "--output",
        metavar="FILE.json",
        help="scores; beside it FILE.jsonl, each example, and FILE.png, the calibration. With it "
        "a killed command goes on when it is given again",
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
