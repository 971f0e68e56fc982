"""Rows of `uld-jax report` for models as they are: teachers, and students before training."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from uld_jax.cli.compose import say
from uld_jax.cli.finished_runs import BEFORE, FinishedRun, short_name
from uld_jax.cli.scoring import Scores
from uld_jax.errors import UserError
from uld_jax.evaluation import (
    Baseline,
    Prediction,
    Published,
    Resampling,
    TeacherAnswers,
    answered,
    find_published,
    read_teacher_answers,
    summarise,
)
from uld_jax.files import locate

Score = Callable[[Prediction], Scores]
# A run, its teacher's answers to its questions, and how many shots those had.
Taught = list[tuple[FinishedRun, list[Prediction], int | None]]
# Teacher, data set, and ids of the held-out questions.
Key = tuple[str, str, frozenset[str]]


def undistilled_rows(
    runs: Sequence[FinishedRun],
    score: Score,
    published: Sequence[Published],
    options: Resampling,
) -> list[Baseline]:
    """A row for each student and data set.

    Args:
        runs: All; what they share decides the answers before training, but where shots are drawn
            by another seed: then each example's scores are averaged.
        score: Scores a prediction.
        published: Figures to stand beside.
        options: Of the intervals.

    Returns:
        The rows.
    """
    groups: dict[tuple[object, ...], list[FinishedRun]] = defaultdict(list)
    for run in runs:
        groups[run.data, *(run.values[name] for name in BEFORE)].append(run)
    rows = []
    for alike in groups.values():
        by_id: dict[str, list[Scores]] = defaultdict(list)
        for run in alike:
            for p in run.before:
                by_id[p.id].append(score(p))
        run, means = alike[0], [*map(mean_scores, by_id.values())]
        source, shots = run.config.student.source, run.config.student.shots
        rows.append(_row("undistilled", source, shots, run, means, published, options))
    return rows


def teacher_rows(
    taught: Taught, score: Score, published: Sequence[Published], options: Resampling
) -> list[Baseline]:
    """A row for each teacher and data set of which answers were given.

    Args:
        taught: From `read_teachers`.
        score: Scores a prediction.
        published: Figures to stand beside.
        options: Of the intervals.

    Returns:
        The rows.
    """
    return [
        _row(
            *("teacher", run.config.teacher.source, shots, run),
            *([score(p) for p in predictions], published, options),
        )
        for run, predictions, shots in taught
    ]


def read_teachers(paths: Sequence[str], runs: Sequence[FinishedRun]) -> Taught:
    """Finds out whose answers to which runs' held-out questions each path has.

    Args:
        paths: See `read_teacher_answers`.
        runs: All.

    Returns:
        For each teacher and data set a run, and the answers with the references of that run.

    Raises:
        UserError: One cannot be read, belongs to no run, to runs of several teachers, or to one
            that another belongs to.
    """
    groups = {_key(run): run for run in reversed(runs)}
    found: dict[Key, str] = {}
    taught: Taught = []
    for path in paths:
        answers = read_teacher_answers(locate(path))
        theirs = _runs_of(path, answers, groups)
        for key, (run, predictions) in theirs.items():
            if key in found:
                raise UserError(
                    f"--teacher: {found[key]} and {path} both have answers of {key[0]} to the "
                    f"questions of {key[1]}, expected one of them"
                )
            found[key] = path
            taught.append((run, predictions, answers.shots))
        if answers.unanswered:
            say(
                f"--teacher={path}: {answers.unanswered} of {len(answers.predictions)} questions "
                "have no answer: they count as unanswered"
            )
    return taught


def mean_scores(rows: Sequence[Scores]) -> Scores:
    """The mean of each metric.

    Args:
        rows: metric -> percent.

    Returns:
        The same, averaged.

    Example:
        >>> mean_scores([{"f1": 40.0}, {"f1": 60.0}])
        {'f1': 50.0}
    """
    return {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _key(run: FinishedRun) -> Key:
    return run.config.teacher.source, run.data, frozenset(p.id for p in run.predictions)


def _runs_of(
    path: str, answers: TeacherAnswers, groups: Mapping[Key, FinishedRun]
) -> dict[Key, tuple[FinishedRun, list[Prediction]]]:
    """The groups whose questions these answers are to, and whose teacher's they may be."""
    fitting, reasons = {}, {}
    for key, run in groups.items():
        predictions = answered(answers, run.predictions)
        if isinstance(predictions, str):
            reasons[run.path] = predictions
        else:
            fitting[key] = run, predictions
    if not fitting:
        known = answers.predictions.keys()
        nearest = max(groups.values(), key=lambda run: sum(p.id in known for p in run.predictions))
        raise UserError(
            f"--teacher={path}: expected answers to the held-out questions of a run, but for the "
            f"nearest, {nearest.path}: {reasons[nearest.path]}; `uld-jax generate "
            "--config.generate.split=eval --output=DIR` writes all, and which have no answer"
        )
    teachers = sorted({teacher for teacher, *_ in fitting})
    if answers.model:
        own = {k: v for k, v in fitting.items() if short_name(k[0]) == short_name(answers.model)}
        if not own:
            raise UserError(
                f"--teacher={path}: expected answers of the teacher of the runs, "
                f"{' or '.join(teachers)}, got those of {answers.model}"
            )
        return own
    if len(teachers) > 1:
        raise UserError(
            f"--teacher={path}: the runs with these questions have several teachers, "
            f"{' and '.join(teachers)}: give the directory that `uld-jax generate --output=DIR` "
            "writes, which names the one that answered"
        )
    return fitting


def _row(
    kind: str,
    source: str,
    shots: int | None,
    run: FinishedRun,
    rows: Sequence[Scores],
    published: Sequence[Published],
    options: Resampling,
) -> Baseline:
    summary = summarise(rows, options)
    beside = find_published(published, student=source, source=run.eval_source)
    return Baseline(
        kind=kind,
        model=short_name(source),
        data=run.data,
        shots=shots,
        examples=len(rows),
        scores=summary["scores"],
        intervals=summary["intervals"],
        published={} if beside is None else beside.scores,
        published_shots=None if beside is None else beside.shots,
    )
