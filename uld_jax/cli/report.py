"""`uld-jax report`: what ULD adds to text distillation, from the workdirs of both."""

import argparse
import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from uld_jax import config as configs
from uld_jax.cli.compose import console, say
from uld_jax.cli.scoring_flags import resampling
from uld_jax.config import LossConfig, RunConfig
from uld_jax.errors import UserError
from uld_jax.evaluation import (
    Line,
    Prediction,
    Published,
    Resampling,
    compare,
    find_published,
    pair_predictions,
    per_example,
    plot_differences,
    read_predictions,
    read_published,
    to_csv,
    to_markdown,
)
from uld_jax.files import locate, make_directory, staged, write_text

SEEDS = ("data.seed", "train.seed", "generate.seed")
# What may differ between runs that are compared: it changes how, not what is computed.
BESIDE = (
    *SEEDS,
    "data.data_dir",
    "eval.batch_size",
    "eval.samples",
    "generate.shard_size",
    "teacher.batch_size",
    "teacher.devices",
    "train.checkpoint_every",
)
Scores = dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A finished run.

    Attributes:
        path: Its workdir.
        config: Its config.
        predictions: Its answers after training.
        values: Its config by field.
    """

    path: str
    config: RunConfig
    predictions: list[Prediction]
    values: dict[str, Any]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.values[name] for name in SEEDS)

    @property
    def shared(self) -> dict[str, Any]:
        """What a run without ULD must share with one that has it."""
        return {
            name: value
            for name, value in self.values.items()
            if name not in BESIDE and not name.startswith(("loss.", "mesh."))
        }

    @property
    def loss(self) -> tuple[tuple[str, Any], ...]:
        """The fields of its loss that change results."""
        names = (f.name for f in dataclasses.fields(LossConfig) if f.name != "chunk_size")
        return tuple((name, getattr(self.config.loss, name)) for name in names)


def run(args: argparse.Namespace) -> None:
    """Writes report.md, report.csv and report.png.

    Args:
        args: Parsed flags.

    Raises:
        UserError: A workdir has no answers, or none without ULD to compare with.
    """
    options = resampling(args)
    published = [] if args.published is None else read_published(locate(args.published))
    runs = [_read(path) for path in args.workdirs]
    with console.status("scoring"):
        lines = _lines(runs, published, options)
    output = locate(args.output)
    try:
        make_directory(output)
    except OSError as error:
        raise UserError(
            f"--output={output}: cannot write there ({error.strerror}): choose another directory"
        ) from error
    markdown = to_markdown(lines, metric=args.metric, confidence=options.confidence)
    write_text(output / "report.md", markdown)
    write_text(output / "report.csv", to_csv(lines))
    with staged(output / "report.png") as file:
        plot_differences(lines, file, metric=args.metric)
    for line in lines:
        x = line.metrics[args.metric]
        say(
            f"{line.teacher} → {line.student}, {line.data}, {line.name}, {line.seeds} seeds: "
            f"{args.metric} {x['other']:.2f} → {x['this']:.2f}, {x['difference']:+.2f} "
            f"({x['low']:+.2f} to {x['high']:+.2f}), p = {x['p']:.4f}"
        )
    say(f"report: {output / 'report.md'}, .csv and .png")


def _read(path: str) -> _Run:
    file = locate(path) / "config.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file, expected the workdir of a run")
    try:
        config = configs.from_dict(json.loads(file.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    return _Run(path, config, read_predictions(locate(path)), configs.flatten(config))


def _lines(runs: Sequence[_Run], published: Sequence[Published], options: Resampling) -> list[Line]:
    """A line for each group of runs with ULD that differ in their seeds alone."""
    plain = [run for run in runs if run.config.loss.uld_weight == 0]
    groups: dict[str, list[tuple[_Run, _Run]]] = defaultdict(list)
    for run in runs:
        if run.config.loss.uld_weight > 0:
            key = json.dumps([run.shared, run.loss], sort_keys=True)
            groups[key].append((run, _without_uld(run, plain)))
    if not groups:
        raise UserError("none of the runs has loss.uld_weight > 0, expected at least one")
    lines = []
    for pairs in groups.values():
        seeds = [run.seeds for run, _ in pairs]
        if twice := [run.path for run, _ in pairs if seeds.count(run.seeds) > 1]:
            raise UserError(
                f"{', '.join(twice)}: the same config and seeds, expected each run once"
            )
        lines.append(_line(pairs, published, options))
    return lines


def _without_uld(run: _Run, plain: Sequence[_Run]) -> _Run:
    """The run that differs from one in its loss alone."""
    alike = [other for other in plain if other.shared == run.shared and other.seeds == run.seeds]
    if len(alike) == 1:
        return alike[0]
    if alike:
        paths = ", ".join(other.path for other in alike)
        raise UserError(f"{paths}: the same config and seeds, expected one run with λ = 0")

    def unlike(other: _Run) -> list[str]:
        ours, theirs = run.shared | _named(run), other.shared | _named(other)
        return [
            f"{name} is {theirs.get(name)!r} and {value!r}"
            for name, value in ours.items()
            if theirs.get(name) != value
        ]

    nearest = min(plain, key=lambda other: len(unlike(other)), default=None)
    reason = "there is none with λ = 0"
    if nearest is not None:
        reason = f"in the nearest, {nearest.path}, {'; '.join(unlike(nearest)[:3])}"
    raise UserError(
        f"{run.path}: expected a run with loss.uld_weight=0 that is otherwise the same, {reason}"
    )


def _named(run: _Run) -> dict[str, Any]:
    return dict(zip(SEEDS, run.seeds, strict=True))


def _line(
    pairs: Sequence[tuple[_Run, _Run]], published: Sequence[Published], options: Resampling
) -> Line:
    uld: dict[str, list[Scores]] = defaultdict(list)
    text: dict[str, list[Scores]] = defaultdict(list)
    by_seed: dict[str, list[float]] = defaultdict(list)
    for run, other in pairs:
        both = pair_predictions(run.predictions, other.predictions, names=(run.path, other.path))
        differences: dict[str, list[float]] = defaultdict(list)
        for p, q in both:
            ours, theirs = (per_example(x.text, x.references) for x in (p, q))
            uld[p.id].append(ours)
            text[p.id].append(theirs)
            for name, value in ours.items():
                differences[name].append(value - theirs[name])
        for name, values in differences.items():
            by_seed[name].append(math.fsum(values) / len(values))
    metrics = compare([*map(_mean, uld.values())], [*map(_mean, text.values())], options)
    config = pairs[0][0].config
    return Line(
        teacher=_short(config.teacher.source),
        student=_short(config.student.source),
        data=_data_name(config),
        uld_weight=config.loss.uld_weight,
        other_settings=_settings(pairs[0][0]),
        seeds=len(pairs),
        examples=len(uld),
        metrics=metrics,
        by_seed=by_seed,
        published=_published(config, published),
    )


def _mean(rows: Sequence[Scores]) -> Scores:
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _settings(run: _Run) -> str:
    default = LossConfig()
    return ", ".join(
        f"{name}={value}"
        for name, value in run.loss
        if name != "uld_weight" and value != getattr(default, name)
    )


def _published(
    config: RunConfig, published: Sequence[Published]
) -> Mapping[str, tuple[float, float]]:
    """Both published scores by metric, where they are of all training examples."""
    if config.data.train_examples:
        return {}
    source = config.data.eval_source or config.data.source
    found = [
        find_published(
            published,
            student=config.student.source,
            teacher=config.teacher.source,
            source=source,
            uld_weight=weight,
        )
        for weight in (0.0, config.loss.uld_weight)
    ]
    text, uld = found
    if text is None or uld is None:
        return {}
    return {
        name: (text.scores[name], uld.scores[name])
        for name in text.scores.keys() & uld.scores.keys()
    }


def _data_name(config: RunConfig) -> str:
    scheme, _, argument = (config.data.eval_source or config.data.source).partition(":")
    share = f", {config.data.train_examples} questions" if config.data.train_examples else ""
    return (_short(argument) or scheme) + share


def _short(source: str) -> str:
    return source.rstrip("/").rpartition("/")[2]
