"""What the subcommands share: the config and its workdir, models, data, and progress bars."""

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from uld_jax import buckets, models
from uld_jax import config as configs
from uld_jax.cli.examples import shot_pool_of
from uld_jax.config import BaseModelConfig, DataConfig, RunConfig, TeacherConfig
from uld_jax.data import (
    Example,
    Side,
    chat_template,
    task_of,
)
from uld_jax.errors import UserError
from uld_jax.evaluation import Evaluation, evaluate
from uld_jax.files import AnyPath, locate, make_directory, remove_tree, write_json
from uld_jax.processes import agreed, is_first, wait_for_all
from uld_jax.sharding import parameter_rules
from uld_jax.train import adapt, restore_params
from uld_jax.train.staging import in_orbax

console = Console()


def say(message: str) -> None:
    """Prints a line as it is: never wrapped, and brackets in it are no markup.

    Args:
        message: The line.

    Example:
        >>> say("student: runs/[a]/student")
        student: runs/[a]/student
    """
    console.print(message, soft_wrap=True, markup=False)


def run_config(
    args: argparse.Namespace,
    *,
    device_count: int | None = None,
    process_count: int | None = None,
) -> RunConfig:
    """The resolved config of a run: from --config and its overrides, or from the workdir.

    Args:
        args: Parsed flags with config, overrides and workdir.
        device_count: Devices that the mesh must cover; all of them by default.
        process_count: Processes that have them; all of them by default.

    Returns:
        The config.

    Raises:
        UserError: Every mistake in it at once; or the workdir was written by another config.
    """
    saved_path = locate(args.workdir) / "config.json" if args.workdir else None
    saved = None
    if saved_path is not None and saved_path.is_file():
        saved = _saved_config(saved_path)
    if not args.config and saved is None:
        where = f"{args.workdir} has no config.json to resume from" if args.workdir else "no run"
        raise UserError(f"{where}: give --config=FILE.py, e.g. --config=configs/quickstart.py")
    base = configs.load(args.config) if args.config else saved
    assert base is not None
    config, errors = configs.apply_overrides(base, args.overrides)
    device_count = jax.device_count() if device_count is None else device_count
    process_count = jax.process_count() if process_count is None else process_count
    config = configs.resolve(
        config, device_count=device_count, process_count=process_count, errors=errors
    )
    different = configs.differences(saved, config) if saved is not None else []
    if different:
        raise UserError(
            f"{args.workdir} holds a run of another config ({'; '.join(different)}): "
            "choose another --workdir, or leave --config out to resume that run"
        )
    return config


def _saved_config(path: AnyPath) -> RunConfig:
    try:
        return configs.from_dict(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}: not JSON ({error}); restore the file or choose another --workdir"
        ) from error


def claim_workdir(path: str, config: RunConfig) -> AnyPath:
    """Makes the workdir, writes the config into it, and clears what a kill left half-written.

    Args:
        path: The workdir.
        config: The resolved config.

    Returns:
        The workdir.

    Raises:
        UserError: It cannot be made or written.
    """
    workdir = locate(path)
    if jax.process_count() > 1 and not in_orbax(workdir):
        raise UserError(
            f"--workdir={path}: {jax.process_count()} processes write the parts of one checkpoint, "
            "which orbax does not do in this store: give a directory that all of them see or "
            "gs://BUCKET/PATH, or train in one process"
        )
    wait_for_all("all that is read before the workdir")
    if not is_first():
        wait_for_all("workdir")
        return workdir
    try:
        make_directory(workdir)
        for scratch in workdir.glob(".*.json*.[0-9]*"):
            scratch.unlink()
        for scratch in workdir.glob(".student-*"):
            remove_tree(scratch)
        if not (workdir / "config.json").is_file():
            write_json(workdir / "config.json", configs.to_dict(config))
    except buckets.errors() as error:
        raise UserError(
            f"--workdir={path}: cannot write there ({buckets.reason(error)}); "
            "choose another directory"
        ) from error
    wait_for_all("workdir")
    return workdir


def load_model(which: str, config: BaseModelConfig, mesh: Mesh) -> models.LoadedModel:
    """Loads the teacher or the student, with a spinner.

    Args:
        which: "teacher" or "student", for people.
        config: What to load and how it computes.
        mesh: Where its parameters go.

    Returns:
        The model.
    """
    with console.status(f"loading the {which}: {config.source}"):
        m = models.load(
            config.source,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            remat=config.remat,
            mesh=mesh,
            rules=parameter_rules(config.shard_parameters),
        )
    count = sum(leaf.size for leaf in jax.tree.leaves(models.parameters(m.model)))
    say(
        f"{which}: {os.path.basename(config.source)}, {count / 1e6:.0f} M parameters, "
        f"vocabulary {m.config.vocab_size:,}"
    )
    if isinstance(config, TeacherConfig) and config.quantize:
        with console.status(f"quantising the {which} to {config.quantize}"):
            models.quantize(m.model, config.quantize)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(models.parameters(m.model)))
        say(f"{which}: {config.quantize}, {held / 2**20:.0f} MiB")
    return m


def load_student(config: RunConfig, workdir: str | None, mesh: Mesh) -> models.LoadedModel:
    """The student as a run's newest checkpoint has it, or as it is before training.

    Args:
        config: The run.
        workdir: Where its checkpoints lie; None for the untrained student.
        mesh: Where its parameters go.

    Returns:
        The model.

    Raises:
        UserError: A workdir without a checkpoint, or adapters for matrices that it does not have.
    """
    student = config.student
    m = load_model("student", student, mesh)
    adapt(m.model, config)
    graph, params, frozen = models.split_trained(m.model)
    if student.lora_rank:
        count = sum(leaf.size for leaf in jax.tree.leaves(params))
        say(f"student: trained are adapters of rank {student.lora_rank}, {count / 1e6:.2f} M")
    if workdir is None:
        return m
    trained = restore_params(locate(workdir) / "checkpoints", params, mesh)
    return dataclasses.replace(m, model=nnx.merge(graph, trained, *frozen))


def side_of(
    config: BaseModelConfig, m: models.LoadedModel | models.LoadedTokenizer, data: DataConfig
) -> Side:
    """How a model is prompted, from its config and its tokenizer.

    Args:
        config: The teacher's or the student's.
        m: The model, or its tokenizer and config.
        data: What it is asked.

    Returns:
        The side; only a student, or a teacher so configured, ends answers with its EOS token.
    """
    templated = chat_template(m.tokenizer) is not None
    teaches = isinstance(config, TeacherConfig)
    return Side(
        m.tokenizer,
        max_length=config.max_length,
        append_eos=config.append_eos if teaches else True,
        shots=config.shots,
        chat={"auto": templated, "always": True, "never": False}[config.chat],
        start_id=m.config.start_id if isinstance(m.config, models.EncoderDecoderConfig) else None,
        task=task_of(data.source) if data.task == "auto" else data.task,
        titles=data.titles == "both" or (teaches and data.titles == "teacher"),
    )


def measure(
    config: RunConfig,
    student: models.LoadedModel,
    train_set: Sequence[Example],
    eval_set: Sequence[Example],
    *,
    title: str = "held-out questions",
) -> Evaluation:
    """The student's answers to the held-out questions and their scores, with a progress bar.

    Args:
        config: The run.
        student: The model.
        train_set: The training examples, which the worked ones in prompts are among.
        eval_set: The held-out questions.
        title: Of the progress bar.

    Returns:
        Scores and answers; how many prompts were too long is printed.
    """
    with progress_bar(title, len(eval_set)) as progress:
        result = evaluate(
            student,
            eval_set,
            side_of(config.student, student, config.data),
            pool=shot_pool_of(config, train_set),
            seed=config.data.seed,
            max_new_tokens=config.eval.max_new_tokens,
            batch_size=config.eval.batch_size,
            progress=progress,
        )
    if result.too_long:
        say(
            f"{result.too_long} of {len(eval_set)} prompts are over "
            f"student.max_length={config.student.max_length}: these questions count as unanswered"
        )
    return result


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar for a stage that takes more than a moment.

    Args:
        title: What is being done.
        total: How many there are.

    Yields:
        A function that moves the bar on by so many.
    """
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


def reuse_or_make(path: AnyPath, make: Callable[[], Any]) -> Any:
    """A stage's result: read where an earlier start of this run wrote it, else made and written.

    Args:
        path: A JSON file in the workdir, which all processes share.
        make: Computes the result; all processes take part, the first one writes.

    Returns:
        The result.
    """
    if not agreed(path.is_file()):
        made = make()
        if is_first():
            write_json(path, made)
        wait_for_all(path.name)
    return json.loads(path.read_text())


def limit_message(dropped: Sequence[tuple[str, int]]) -> str:
    """One line that counts what was left out, empty where nothing was.

    Args:
        dropped: Reason and number.

    Returns:
        The line.

    Example:
        >>> limit_message([("empty answer", 2), ("too long", 0)])
        'left out: 2 empty answer'
    """
    parts = [f"{count} {reason}" for reason, count in dropped if count]
    return f"left out: {', '.join(parts)}" if parts else ""
