"""`uld-jax train`: measure, let the teacher answer, distil, measure again, save."""

import argparse
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from uld_jax import config as configs
from uld_jax import models, preflight
from uld_jax.cli import compose, devices
from uld_jax.cli.answers import answer_split
from uld_jax.cli.compose import console, progress_bar, reuse_or_make, say
from uld_jax.cli.examples import load_split, shot_pool_of
from uld_jax.cli.teachers import (
    Teacher,
    cached_answers,
    compared_by,
    load_teachers,
    open_signals,
    taught_from,
)
from uld_jax.config import RunConfig
from uld_jax.data import (
    Example,
    Loader,
    Side,
    encode_pairs,
    encode_prompts,
    load_examples,
    make_loader,
    verify_answers,
)
from uld_jax.errors import UserError
from uld_jax.evaluation import comparison_table, plot_losses, sample_table
from uld_jax.files import AnyPath, is_complete, locate, remove_tree, staged
from uld_jax.processes import agreed, is_first, wait_for_all
from uld_jax.sharding import batch_shards
from uld_jax.train import (
    MetricsWriter,
    OnPolicy,
    WandbRun,
    fit,
    read_metrics,
    require_wandb,
)
from uld_jax.train.loop import step_count

PROMPTS_AT_A_TIME = 64
# Seconds after which a log is due a line, however long the steps are.
SILENCE = 60
# Takes a group of numbers, the numbers by name, and their step.
Track = Callable[[str, Mapping[str, Any], int], None]


@dataclasses.dataclass
class Job:
    """What the stages share."""

    config: RunConfig
    workdir: AnyPath
    meshes: dict[str, jax.sharding.Mesh]
    student: models.LoadedModel
    teachers: list[Teacher]
    train_set: list[Example]
    eval_set: list[Example]

    @functools.cached_property
    def pool(self) -> Sequence[Example]:
        """What the worked examples in prompts are drawn from."""
        return shot_pool_of(self.config, self.train_set)

    @property
    def student_side(self) -> Side:
        """How the student is prompted."""
        return compose.side_of(self.config.student, self.student, self.config.data)

    @property
    def teacher_sides(self) -> list[Side]:
        """How each teacher is prompted."""
        return [
            compose.side_of(config, teacher, self.config.data)
            for config, teacher in zip(self.config.teachers, self.teachers, strict=True)
        ]

    @property
    def sides(self) -> dict[str, Side]:
        """By the path of their config."""
        names = self.config.teacher_groups()
        return {"student": self.student_side, **dict(zip(names, self.teacher_sides, strict=True))}


def run(args: argparse.Namespace) -> None:
    """Runs or resumes the whole job; every finished stage is kept in the workdir.

    Args:
        args: Parsed flags.

    Raises:
        UserError: Bad input of any kind.
    """
    config = compose.run_config(args)
    if config.train.wandb_project:
        require_wandb()
    if config.data.answers == "teacher" and config.generate.samples > 1:
        raise UserError(
            f"generate.samples={config.generate.samples}: expected 1, an answer to each question; "
            "let `uld-jax generate` write several, and set --config.data.source=generated:DIR "
            "--config.data.answers=gold"
        )
    meshes = devices.meshes(config)
    train_set, eval_set = (load_split(config, split) for split in ("train", "eval"))
    teachers = load_teachers(config, meshes)
    student = compose.load_student(config, None, meshes["student"])
    workdir = locate(args.workdir)
    job = Job(config, workdir, meshes, student, teachers, train_set, eval_set)
    # Nothing is written before everything that can be wrong has been looked at.
    _check_tokenizers(job)
    answers = cached_answers(config, teachers[0], train_set)
    loader = None if answers is None else loader_of(job, answers)
    if loader is None:
        _check_prompts(job)
    compose.claim_workdir(args.workdir, config)
    say(f"data: {len(train_set)} training and {len(eval_set)} held-out questions")
    before = reuse_or_make(workdir / "before.json", lambda: _measure(job, "before training"))
    if loader is None:
        loader = loader_of(job, _answers(job))
    steps = step_count(loader, config)
    with _tracking(job) as track:
        track("eval", before["scores"], 0)
        job.student = dataclasses.replace(student, model=_distil(job, loader, track))
        after = reuse_or_make(workdir / "after.json", lambda: _measure(job, "after training"))
        track("eval", after["scores"], steps)
    _save(job, before, after, steps=steps)


@contextlib.contextmanager
def _tracking(job: Job) -> Iterator[Track]:
    """Sends what it is called with to Weights & Biases, if the config has a project there."""
    project = job.config.train.wandb_project
    if not project or not is_first():
        yield lambda group, values, step: None
        return
    with WandbRun(project, job.workdir, configs.to_dict(job.config)) as run:
        yield lambda group, values, step: run.log(group, values, step=step)


def _check_tokenizers(job: Job) -> None:
    """Refuses what cannot work with a tokenizer: the cheap part of `uld-jax check`."""
    for (path, side), m in zip(job.sides.items(), (job.student, *job.teachers), strict=True):
        facts = preflight.tokenizer_facts(path, side, m.config)
        for finding in preflight.side_findings(path, facts):
            if finding.level == "error":
                raise UserError(f"{finding.text}: {finding.mend}")


def _check_prompts(job: Job) -> None:
    """Refuses a limit that every prompt is over; reads no further than the first that is not."""
    for name, side in job.sides.items():
        lengths = (
            len(ids)
            for start in range(0, len(job.train_set), PROMPTS_AT_A_TIME)
            for ids in encode_prompts(
                job.train_set[start : start + PROMPTS_AT_A_TIME],
                side,
                pool=job.pool,
                seed=job.config.data.seed,
            )
        )
        if all(length >= side.max_length for length in lengths):
            raise UserError(
                f"{name}.max_length={side.max_length}: all {len(job.train_set)} training prompts "
                f"leave no room for an answer; set --config.{name}.max_length higher, "
                f"or --config.{name}.shots lower"
            )


def _measure(job: Job, when: str) -> dict[str, Any]:
    """Scores and answers of the student on the held-out questions."""
    title = f"held-out questions {when}"
    result = compose.measure(job.config, job.student, job.train_set, job.eval_set, title=title)
    return dataclasses.asdict(result)


def _answers(job: Job) -> dict[str, str]:
    """The teacher's answers, from shards that are kept until they are one file."""
    shards = job.workdir / "teacher_answers"
    answers = reuse_or_make(job.workdir / "teacher_answers.json", lambda: _ask(job, shards))
    if is_first() and shards.is_dir():
        remove_tree(shards)
    return answers


def _ask(job: Job, shards: AnyPath) -> dict[str, str]:
    """Example id to answer; one that is empty is there, one that is too long is not."""
    teacher = job.teachers[0]
    assert isinstance(teacher, models.LoadedModel)
    writer = answer_split(
        job.config,
        teacher,
        job.train_set,
        pool=job.pool,
        directory=shards,
        split="train",
        samples=1,
        title="the teacher answers the training questions",
    )
    if is_first():
        writer.finish()
    wait_for_all("all answers")
    manifest = verify_answers(shards)
    found = {id_: "" for s in manifest["shards"] for id_ in s["dropped"].get("empty_answer", ())}
    if manifest["answers"]:
        found |= {e.id: e.answers[0] for e in load_examples(f"generated:{shards}", "train")}
    return {example.id: found[example.id] for example in job.train_set if example.id in found}


def loader_of(job: Job, answers: Mapping[str, str]) -> Loader:
    """Tokenises question and answer for all models and plans the batches.

    Args:
        job: The run.
        answers: Answer by example id.

    Returns:
        The batches.
    """
    config = job.config
    answered = [example for example in job.train_set if example.id in answers]
    pairs, dropped = encode_pairs(
        answered,
        answers,
        student=job.student_side,
        teachers=job.teacher_sides,
        pool=job.pool,
        seed=config.data.seed,
    )
    sides = job.teacher_sides
    signals = open_signals(config, job.teachers, sides, job.train_set, answers, job.pool)
    read = [
        pair for pair in pairs if all(pair.id in store for store in signals if store is not None)
    ]
    drop = config.data.answers == "teacher" and config.generate.cut_answers == "drop"
    cut = f" or teacher.max_new_tokens={config.teacher.max_new_tokens}" if drop else ""
    message = compose.limit_message(
        [
            ("without a signal in a teacher's cache", len(pairs) - len(read)),
            ("with an empty answer", dropped.empty_answer),
            (f"over student.max_length={config.student.max_length}", dropped.too_long_student),
            (
                f"over teacher.max_length={', '.join(str(t.max_length) for t in config.teachers)}"
                f"{cut}",
                dropped.too_long_teacher + len(job.train_set) - len(answered),
            ),
        ]
    )
    if message:
        say(message)
    return make_loader(
        read,
        batch_size=config.data.batch_size,
        epochs=config.train.epochs,
        seed=config.data.seed,
        micro_batches=config.train.accumulation,
        groups=batch_shards(job.meshes["student"]),
        buckets=config.data.buckets,
        length_parts=job.meshes["student"].shape["sequence"],
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        answer_room=on_policy.answer_room if (on_policy := _on_policy(job)) else 0,
        signals=signals,
        token_signals=config.loss.distance != "uld",
        convention=config.loss.convention,
        skip_student_eos=config.loss.skip_student_eos,
        skip_teacher_eos=config.loss.skip_teacher_eos,
        alignment=config.loss.alignment,
    )


def _on_policy(job: Job) -> OnPolicy | None:
    """What samples answers from the student during training, if the config asks for it."""
    config = job.config
    if not config.train.on_policy_fraction:
        return None
    return OnPolicy(
        job.student_side,
        job.teacher_sides,
        examples={example.id: example for example in job.train_set},
        pool=job.pool,
        seed=config.data.seed,
        fraction=config.train.on_policy_fraction,
        sampling=models.Sampling(temperature=config.train.on_policy_temperature),
        max_new_tokens=config.train.on_policy_tokens,
        stop_ids=models.line_stop_ids(job.student),
    )


def _distil(job: Job, loader: Loader, track: Track) -> models.Decoder:
    steps = step_count(loader, job.config)
    shapes = ", ".join(
        f"{'+'.join(str(length) for length in shape.lengths)} tokens, "
        f"{shape.positions} answer positions"
        for shape in loader.shapes
    )
    say(f"distilling: {steps} steps; padded sizes: {shapes}")
    with progress_bar("distilling", steps) as progress:
        shown, said, name = 0, time.monotonic(), job.config.loss.distance

        def show(step: int, steps: int, row: Mapping[str, float]) -> None:
            nonlocal shown, said
            progress(step - shown)
            track("train", row, step)
            shown, now = step, time.monotonic()
            if step == steps or step % max(1, steps // 10) == 0 or now - said >= SILENCE:
                said = now
                say(
                    f"step {step}/{steps}: loss {row['total']:.3f} = CE {row['cross_entropy']:.3f}"
                    f" + {job.config.loss.uld_weight:g} · {name.upper()} {row[name]:.3f}"
                    f"{_of_features(job.config.loss, row)}; "
                    f"{row['seconds']:.2f} s, {row['tokens_per_second']:,.0f} tokens/s"
                )

        return fit(
            job.student.model,
            taught_from(job.config, job.teachers, job.meshes),
            loader,
            job.config,
            mesh=job.meshes["student"],
            workdir=job.workdir,
            comparisons=compared_by(job.config, job.student, job.teachers),
            on_policy=_on_policy(job),
            progress=show,
        )


def _of_features(loss: configs.LossConfig, row: Mapping[str, float]) -> str:
    """What hidden states and attention add to the loss, where they are compared."""
    weights = {"hidden": loss.hidden_weight, "attention": loss.attention_weight}
    return "".join(
        f" + {weight:g} · {name} {row[name]:.4f}" for name, weight in weights.items() if weight
    )


def _save(job: Job, before: dict[str, Any], after: dict[str, Any], *, steps: int) -> None:
    """The Hugging Face directory, the plot, the scores, and the tables on the screen."""
    workdir, export = job.workdir, job.workdir / "student"
    if not agreed(is_complete(export)):
        with console.status("writing the student in the Hugging Face format"):
            models.save_pretrained(job.student, export)
    if not is_first():
        return
    rows = read_metrics(workdir)
    with MetricsWriter(workdir, step=steps) as writer:
        writer.write_scores(before["scores"], step=0)
        writer.write_scores(after["scores"], step=steps)
    with staged(workdir / "loss.png") as scratch:
        plot_losses(rows, scratch, distance=job.config.loss.distance)
    console.print(comparison_table(before["scores"], after["scores"]))
    samples = [
        {
            "question": old["question"],
            "reference": old["references"][0],
            "before": old["prediction"],
            "after": new["prediction"],
        }
        for old, new in zip(before["answers"], after["answers"], strict=True)
    ]
    console.print(sample_table(samples[: job.config.eval.samples]))
    say(f"student (Hugging Face format): {export}\nloss curve: {workdir / 'loss.png'}")
