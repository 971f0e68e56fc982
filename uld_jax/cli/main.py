"""The command `uld-jax`: parses, dispatches, and turns mistakes into one line."""

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence

import absl.logging
from absl import flags
from absl.flags import argparse_flags

import uld_jax
from uld_jax import buckets
from uld_jax.cli import bench, distributed, scoring_flags
from uld_jax.errors import Preempted, UserError

# EX_TEMPFAIL of sysexits.h: the same command will go on.
AGAIN = 75
COMMANDS = {
    "train": "distil a teacher into a student, or resume a run",
    "generate": "let the teacher answer a data set's questions, or resume that",
    "cache": "store what the teacher says of the training answers; again: continue",
    "evaluate": "score a model's answers to held-out questions",
    "export": "write a run's student as a Hugging Face directory",
    "check": "what will go wrong with this teacher and this student, before the first step",
    "plan": "compile a run's programs for TPUs that are not there: do they fit, how fast are they",
}
EPILOG = """\
Any field of the config can be set after it: --config.data.batch_size=16 --config.train.epochs=3.
`uld-jax fields` lists them with their defaults.

examples:
  uld-jax train --config=configs/quickstart.py --workdir=runs/first
  uld-jax train --workdir=runs/first                      (resumes it)
  uld-jax evaluate --workdir=runs/first
  uld-jax plan --config=configs/quickstart.py --topology=v5e:2x2
  uld-jax train --config=configs/quickstart.py --workdir=runs/mine \\
      --config.data.source=jsonl:my.jsonl --config.student.source=owner/student
"""


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes the --config.a.b=value flags out of a command line.

    Args:
        argv: Arguments after the program's name.

    Returns:
        The other arguments, and path to value.

    Raises:
        UserError: An override without a value.

    Example:
        >>> split_overrides(["train", "--config=c.py", "--config.data.seed=3"])
        (['train', '--config=c.py'], {'data.seed': '3'})
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    waiting = iter(argv)
    for argument in waiting:
        if not argument.startswith("--config."):
            rest.append(argument)
            continue
        path, given, value = argument.removeprefix("--config.").partition("=")
        if not given:
            value = next(waiting, None)
            if value is None:
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
        overrides[path] = value
    return rest, overrides


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; absl's own flags are understood too."""
    parser = argparse_flags.ArgumentParser(
        prog="uld-jax",
        description=uld_jax.__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=uld_jax.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--config", metavar="FILE.py", help="config file: get_config()")
        command.add_argument(
            "--workdir",
            metavar="DIR",
            required=name in ("train", "export"),
            help="the run's directory, or gs:// or s3://BUCKET/PATH: config, checkpoints, results",
        )
        if name in ("generate", "cache", "export"):
            command.add_argument("--output", metavar="PATH", required=True, help="what to write")
        if name not in ("plan", "check"):
            distributed.add_flags(command)
        if name == "evaluate":
            scoring_flags.add_evaluate_flags(command)
        if name == "plan":
            _add_plan_flags(command)
        if name == "check":
            _add_check_flags(command)
    bench.add_parser(commands)
    scoring_flags.add_report_parser(commands)
    commands.add_parser("fields", help="list every config field with its default")
    return parser


def _add_plan_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--topology",
        metavar="NAME[,NAME]",
        required=True,
        help="slices, such as v5e:4x4; 2xv5e:4x4 is two of them, joined by a slower network "
        "(mesh.slices=2); with --platform=cuda a number of GPUs",
    )
    command.add_argument(
        "--platform", choices=("tpu", "cuda"), default="tpu", help="for CUDA it is lowered only"
    )
    command.add_argument(
        "--program",
        choices=("train", "answers", "cache"),
        default="train",
        help="the train step; the teacher's answers; its signals for a cache, on one host's slice",
    )
    command.add_argument("--largest", action="store_true", help="find the largest batch that fits")
    command.add_argument("--sweep", action="store_true", help="rank all meshes of the chips")
    command.add_argument("--json", metavar="FILE.json", help="the same numbers, for programs")


def _add_check_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--output", metavar="DIR", help="write the report there, with a picture")
    command.add_argument(
        "--samples", metavar="N", type=int, default=200, help="training examples to look at [200]"
    )
    command.add_argument(
        "--weights", action="store_true", help="load the models: do they expect the answers?"
    )


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
        argv: Arguments after the program's name.

    Returns:
        The exit status: 0; 2 after a one-line error; 75 where the same command is to be run again.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        rest, overrides = split_overrides(argv)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(["uld-jax"])
            # What orbax and TFDS log as an error they also raise. --verbosity=0 shows it all.
            absl.logging.set_verbosity(absl.logging.FATAL)
            # orbax raises the first failed write; asyncio logs those of the array's other pieces.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        args = build_parser().parse_args(rest)
        args.overrides, args.argv = overrides, list(argv)
        _check_addresses(args)
        # Imported late: `--help` should not wait for JAX.
        several = hasattr(args, "coordinator")
        with distributed.Joined(args) if several else contextlib.nullcontext():
            importlib.import_module(f"uld_jax.cli.{args.command}").run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Preempted as stop:
        print(f"{stop}: run the same command again to go on", file=sys.stderr)
        return AGAIN
    except (RuntimeError, ValueError) as error:
        from uld_jax.processes import is_lost_process

        if not is_lost_process(error):
            raise
        print(
            f"error: another process is gone ({str(error).splitlines()[0]}): start all of them "
            "again, the run goes on from its newest checkpoint",
            file=sys.stderr,
        )
        return AGAIN
    except buckets.errors() as error:
        where = f"{name}: " if (name := getattr(error, "filename", None)) else ""
        print(f"error: {where}{buckets.reason(error)}", file=sys.stderr)
        return 2
    return 0


def _check_addresses(args: argparse.Namespace) -> None:
    for name in ("workdir", "output"):
        if "://" in (address := getattr(args, name, None) or ""):
            buckets.check_address(address, name)


def run() -> None:
    """The console script."""
    # transformers announces at import that it found no torch, which we do without.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # A write that fails leaves tensorstore's other writes without anyone to report to; they
    # would print a traceback each, here and while the interpreter closes.
    sys.unraisablehook = lambda unraisable: logging.debug("ignored: %s", unraisable.exc_value)
    status = main(sys.argv[1:])
    sys.stdout.flush()
    if status:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    run()
