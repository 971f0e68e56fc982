"""`uld-jax evaluate`: a model's answers to the held-out questions and their scores."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from uld_jax.cli import compose
from uld_jax.cli.compose import console, say
from uld_jax.cli.devices import evaluation_mesh
from uld_jax.cli.examples import load_split, shot_pool_of
from uld_jax.cli.held_out import HeldOut, Journals, open_journals, say_left_out
from uld_jax.cli.scoring import score_predictions
from uld_jax.cli.scoring_flags import resampling
from uld_jax.config import RunConfig
from uld_jax.errors import UserError
from uld_jax.evaluation import (
    Prediction,
    Reliability,
    Resampling,
    compare,
    pair_predictions,
    plot_reliability,
    read_predictions,
    require_bert_score,
    summarise,
    summarise_readings,
)
from uld_jax.files import AnyPath, locate, make_directory, staged, write_json, write_text
from uld_jax.processes import is_first, wait_for_all

Readings = dict[str, dict[str, dict[str, Any]]]


@dataclasses.dataclass
class _Result:
    """What is reported on.

    Attributes:
        name: Of what is evaluated, for people.
        predictions: The answers.
        too_long: Questions whose prompt was over the limit.
        readings: Model -> example id -> what it says of the reference.
    """

    name: str
    predictions: Sequence[Prediction]
    too_long: int = 0
    readings: Readings = dataclasses.field(default_factory=dict)


def run(args: argparse.Namespace) -> None:
    """Scores a run's student, with --config or --model another, or answers in a file.

    Args:
        args: Parsed flags.

    Raises:
        UserError: Bad input of any kind.
    """
    options, output = _options(args), locate(args.output) if args.output else None
    against = None if args.against is None else read_predictions(locate(args.against))
    if args.predictions is not None:
        if is_first():
            predictions = read_predictions(locate(args.predictions))
            _report(args, _Result(args.predictions, predictions), against, options)
        return
    config = compose.run_config(args)
    workdir = args.workdir
    if args.model:
        student = dataclasses.replace(config.student, source=args.model, lora_rank=0)
        config, workdir = dataclasses.replace(config, student=student), None
    if args.teacher and config.teacher.server:
        raise UserError("--teacher: the teacher is a server, expected one with weights to load")
    with open_journals(output) as journals:
        result = _measure(args, config, workdir, journals, against)
        if is_first():
            _report(args, result, against, options)
        wait_for_all("report")
        if is_first():
            journals.remove()


def _options(args: argparse.Namespace) -> Resampling:
    """The flags that need no model, checked before one is loaded."""
    if args.predictions is not None:
        given = [
            f"--{name}" for name in ("workdir", "config", "model", "teacher") if getattr(args, name)
        ]
        if given:
            raise UserError(f"--predictions has its own answers: leave out {', '.join(given)}")
    if args.output and not args.output.endswith(".json"):
        raise UserError(f"--output={args.output}: expected a name that ends in .json")
    if args.bertscore:
        require_bert_score()
    return resampling(args)


def _measure(
    args: argparse.Namespace,
    config: RunConfig,
    workdir: str | None,
    journals: Journals,
    against: Sequence[Prediction] | None,
) -> _Result:
    """The student's answers, and what it and perhaps the teacher say of the references."""
    mesh, apart = evaluation_mesh(config)
    train_set, examples = (load_split(config, split) for split in ("train", "eval"))
    name = args.model or workdir or config.student.source
    if against is not None:
        asked = [Prediction("", example.answers, example.id) for example in examples]
        pair_predictions(asked, against, names=("the held-out questions", args.against))
    pool = shot_pool_of(config, train_set)
    held_out = HeldOut(config, examples, pool, mesh, apart, journals)
    student = compose.load_student(config, workdir, mesh)
    answers = held_out.answers(student)
    readings: Readings = {"student": held_out.readings("student", config.student, student)}
    del student  # makes room
    if args.teacher:
        teacher = compose.load_model("teacher", config.teacher, mesh)
        readings["teacher"] = held_out.readings("teacher", config.teacher, teacher)
    say_left_out(config, answers, readings)
    predictions = [
        Prediction(answers[e.id]["prediction"], e.answers, e.id, e.question) for e in examples
    ]
    too_long = sum(record["too_long"] for record in answers.values())
    return _Result(name, predictions, too_long, readings)


def _report(
    args: argparse.Namespace,
    result: _Result,
    against: Sequence[Prediction] | None,
    options: Resampling,
) -> None:
    """Scores, and says and writes them."""
    pairs = None
    if against is not None:
        pairs = pair_predictions(result.predictions, against, names=(result.name, args.against))
    rows = score_predictions(result.predictions, args.bertscore)
    summary: dict[str, Any] = summarise(rows, options)
    summary |= {"examples": len(rows), "too_long": result.too_long}
    for which, records in result.readings.items():
        read = [
            {**records[p.id], "bytes": len(p.references[0].encode())}
            for p in result.predictions
            if "left_out" not in records[p.id]
        ]
        if read:
            summary[which] = summarise_readings(read, options)
    if pairs is not None:
        others = score_predictions([other for _, other in pairs], args.bertscore)
        summary["against"] = {"path": args.against, "metrics": compare(rows, others, options)}
    summary["resampling"] = dataclasses.asdict(options)
    _show(summary, options)
    if args.output:
        _write(locate(args.output), result, rows, summary)


def _show(summary: dict[str, Any], options: Resampling) -> None:
    interval = f"{100 * options.confidence:g} % interval"
    table = Table("metric", "percent", interval)
    for name, value in summary["scores"].items():
        low, high = summary["intervals"][name]
        table.add_row(name, f"{value:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(table)
    for which in ("student", "teacher"):
        if found := summary.get(which):
            low, high = found["bits_per_byte_interval"]
            say(
                f"{which}, on {found['answers']:,} reference answers: "
                f"{found['bits_per_byte']:.3f} bits per byte ({low:.3f} to {high:.3f}), "
                f"calibration error {found['expected_calibration_error']:.2f} % "
                f"over {found['tokens']:,} tokens"
            )
    if "against" not in summary:
        return
    table = Table("metric", "this", "other", "difference", interval, "p")
    for name, x in summary["against"]["metrics"].items():
        ends = f"{x['low']:+.2f} to {x['high']:+.2f}"
        means = (f"{x[key]:.2f}" for key in ("this", "other"))
        table.add_row(name, *means, f"{x['difference']:+.2f}", ends, f"{x['p']:.4f}")
    console.print(table)
    say(_verdict(summary["against"], options))


def _verdict(against: dict[str, Any], options: Resampling) -> str:
    f1 = against["metrics"]["f1"]
    if f1["p"] >= 1 - options.confidence:
        found = "no difference shown"
    else:
        found = "this one is better" if f1["difference"] > 0 else "the other one is better"
    return (
        f"F1 {f1['difference']:+.2f} points against {against['path']}: {found} "
        f"(two-sided sign-flip permutation test of the mean difference, p = {f1['p']:.4f})"
    )


def _write(
    output: AnyPath, result: _Result, rows: Sequence[dict[str, float]], summary: dict[str, Any]
) -> None:
    lines = []
    for p, row in zip(result.predictions, rows, strict=True):
        named = {"id": p.id, "question": p.question} if p.id else {}
        record = named | {"references": list(p.references), "prediction": p.text, "scores": row}
        record |= {which: records[p.id] for which, records in result.readings.items()}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    make_directory(output.parent)
    write_text(output.with_suffix(".jsonl"), "".join(lines))
    bins = {which: summary[which]["bins"] for which in result.readings if which in summary}
    if bins:
        plots = {
            which: Reliability(**{key: np.array(values) for key, values in found.items()})
            for which, found in bins.items()
        }
        with staged(output.with_suffix(".png")) as file:
            plot_reliability(plots, file)
    write_json(output, summary)
    say(f"scores: {output}; each example: {output.with_suffix('.jsonl')}")
