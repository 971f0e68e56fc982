"""`uld-jax report`: what ULD adds to text distillation, from the workdirs of both."""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from uld_jax.cli.baselines import Score, mean_scores, read_teachers, teacher_rows, undistilled_rows
from uld_jax.cli.compose import console, say
from uld_jax.cli.finished_runs import SEEDS, FinishedRun, read_run
from uld_jax.cli.scoring import Scores, score_once
from uld_jax.cli.scoring_flags import resampling
from uld_jax.config import LossConfig
from uld_jax.errors import UserError
from uld_jax.evaluation import (
    Line,
    Prediction,
    Published,
    Resampling,
    compare,
    find_published,
    pair_predictions,
    plot_differences,
    read_published,
    require_bert_score,
    to_csv,
    to_markdown,
)
from uld_jax.evaluation.predictions import STAGES
from uld_jax.files import locate, make_directory, staged, write_text

# A run with ULD, the one without, and their answers side by side.
Pair = tuple[FinishedRun, FinishedRun, list[tuple[Prediction, Prediction]]]


def run(args: argparse.Namespace) -> None:
    """Writes report.md, report.csv and report.png.

    Args:
        args: Parsed flags.

    Raises:
        UserError: A workdir has no answers, or none without ULD to compare with.
    """
    options = _options(args)
    published = [] if args.published is None else read_published(locate(args.published))
    runs = [read_run(path) for path in args.workdirs]
    groups = _groups(runs)
    compared = {each.path for pairs in groups for run, other, _ in pairs for each in (run, other)}
    runs = [run for run in runs if run.path in compared]
    taught = read_teachers([path for path in args.teacher.split(",") if path], runs)
    everything = [p for run in runs for p in (*run.before, *run.predictions)]
    everything += [p for _, predictions, _ in taught for p in predictions]
    score = score_once(everything, args.bertscore)
    with console.status("resampling"):
        lines = [_line(pairs, score, published, options) for pairs in groups]
        baselines = teacher_rows(taught, score, published, options)
        baselines += undistilled_rows(runs, score, published, options)
    output = locate(args.output)
    try:
        make_directory(output)
    except OSError as error:
        raise UserError(
            f"--output={output}: cannot write there ({error.strerror}): choose another directory"
        ) from error
    markdown = to_markdown(lines, baselines, metric=args.metric, confidence=options.confidence)
    write_text(output / "report.md", markdown)
    write_text(output / "report.csv", to_csv(lines, baselines))
    with staged(output / "report.png") as file:
        plot_differences(lines, file, baselines, metric=args.metric)
    for b in baselines:
        low, high = b.intervals[args.metric]
        say(
            f"{b.model}, {b.data}, {b.name}: {args.metric} {b.scores[args.metric]:.2f} "
            f"({low:.2f} to {high:.2f})"
        )
    for line in lines:
        x = line.metrics[args.metric]
        say(
            f"{line.teacher} → {line.student}, {line.data}, {line.name}, "
            f"{line.seeds} seed{'' if line.seeds == 1 else 's'}: "
            f"{args.metric} {x['other']:.2f} → {x['this']:.2f}, {x['difference']:+.2f} "
            f"({x['low']:+.2f} to {x['high']:+.2f}), p = {x['p']:.4f}"
        )
    say(f"report: {output / 'report.md'}, .csv and .png")


def _options(args: argparse.Namespace) -> Resampling:
    """The flags that need no run, checked before one is read."""
    if args.bertscore:
        if (locate(args.bertscore) / STAGES["after"]).is_file():
            raise UserError(
                f"--bertscore={args.bertscore}: expected a model, got the workdir of a run: write "
                "--bertscore=MODEL, or --bertscore behind the workdirs"
            )
        require_bert_score()
    elif args.metric == "bertscore":
        raise UserError("--metric=bertscore: expected --bertscore too, which computes it")
    return resampling(args)


def _groups(runs: Sequence[FinishedRun]) -> list[list[Pair]]:
    """Runs with ULD, each beside that without; together those that differ in seeds alone."""
    plain = [run for run in runs if run.config.loss.uld_weight == 0]
    groups: dict[str, list[tuple[FinishedRun, FinishedRun]]] = defaultdict(list)
    for run in runs:
        if run.config.loss.uld_weight > 0:
            key = json.dumps([run.shared, run.loss], sort_keys=True)
            groups[key].append((run, _without_uld(run, plain)))
    if not groups:
        raise UserError("none of the runs has loss.uld_weight > 0, expected at least one")
    for pairs in groups.values():
        seeds = [run.seeds for run, _ in pairs]
        if twice := [run.path for run, _ in pairs if seeds.count(run.seeds) > 1]:
            raise UserError(
                f"{', '.join(twice)}: the same config and seeds, expected each run once"
            )
    return [[(run, other, _both(run, other)) for run, other in pairs] for pairs in groups.values()]


def _both(run: FinishedRun, other: FinishedRun) -> list[tuple[Prediction, Prediction]]:
    return pair_predictions(run.predictions, other.predictions, names=(run.path, other.path))


def _without_uld(run: FinishedRun, plain: Sequence[FinishedRun]) -> FinishedRun:
    """The run that differs from one in its loss alone."""
    alike = [other for other in plain if other.shared == run.shared and other.seeds == run.seeds]
    if len(alike) == 1:
        return alike[0]
    if alike:
        paths = ", ".join(other.path for other in alike)
        raise UserError(f"{paths}: the same config and seeds, expected one run with λ = 0")

    def unlike(other: FinishedRun) -> list[str]:
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


def _named(run: FinishedRun) -> dict[str, Any]:
    return dict(zip(SEEDS, run.seeds, strict=True))


def _line(
    pairs: Sequence[Pair], score: Score, published: Sequence[Published], options: Resampling
) -> Line:
    uld: dict[str, list[Scores]] = defaultdict(list)
    text: dict[str, list[Scores]] = defaultdict(list)
    by_seed: dict[str, list[float]] = defaultdict(list)
    for _, _, both in pairs:
        differences: dict[str, list[float]] = defaultdict(list)
        for p, q in both:
            ours, theirs = score(p), score(q)
            uld[p.id].append(ours)
            text[p.id].append(theirs)
            for name, value in ours.items():
                differences[name].append(value - theirs[name])
        for name, values in differences.items():
            by_seed[name].append(math.fsum(values) / len(values))
    metrics = compare(
        [*map(mean_scores, uld.values())], [*map(mean_scores, text.values())], options
    )
    run, *_ = pairs[0]
    return Line(
        teacher=run.teacher,
        student=run.student,
        data=run.data,
        uld_weight=run.config.loss.uld_weight,
        other_settings=_settings(run),
        seeds=len(pairs),
        examples=len(uld),
        metrics=metrics,
        by_seed=by_seed,
        published=_published(run, published),
    )


def _settings(run: FinishedRun) -> str:
    default = LossConfig()
    return ", ".join(
        f"{name}={value}"
        for name, value in run.loss
        if name != "uld_weight" and value != getattr(default, name)
    )


def _published(
    run: FinishedRun, published: Sequence[Published]
) -> Mapping[str, tuple[float, float]]:
    """Both published scores by metric, where they are of all training examples."""
    config = run.config
    if config.data.train_examples:
        return {}
    found = [
        find_published(
            published,
            student=config.student.source,
            teacher=config.teacher.source,
            source=run.eval_source,
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
