"""`uld-jax check`: what will go wrong with a teacher and a student, before the first step."""

import argparse
import dataclasses
import functools
from collections.abc import Sequence

from uld_jax import models, preflight
from uld_jax import plan as planning
from uld_jax.cli import compose, devices
from uld_jax.cli.compose import console, say
from uld_jax.cli.examples import load_split, shot_pool_of
from uld_jax.config import BaseModelConfig, RunConfig
from uld_jax.data import Example, Pair, Side, pairs_or_reasons
from uld_jax.errors import UserError
from uld_jax.evaluation import bits_per_byte, read_answers
from uld_jax.files import AnyPath, locate, make_directory, staged, write_json, write_text
from uld_jax.preflight import Report, TokenizerFacts

# Answers of which one is in the picture.
MOST_DRAWN = 50


@dataclasses.dataclass(frozen=True)
class _Member:
    """One of a pair.

    Attributes:
        path: "student", or the path of the teacher's config.
        group: Its config.
        m: Its tokenizer and what it is made of.
        side: How it is prompted.
    """

    path: str
    group: BaseModelConfig
    m: models.LoadedTokenizer
    side: Side

    @functools.cached_property
    def facts(self) -> TokenizerFacts:
        return preflight.tokenizer_facts(self.group.source, self.side, self.m.config)


def run(args: argparse.Namespace) -> None:
    """Prints what was found of the student and each teacher, and writes a report of each.

    Args:
        args: Parsed flags.

    Raises:
        UserError: Bad input, or something that training cannot work with.
    """
    if args.samples < 1:
        raise UserError(f"--samples={args.samples}: expected 1 or more")
    config = compose.run_config(args)
    groups = {"student": config.student, **config.teacher_groups()}
    loaded = {
        path: models.load_tokenizer(group.source, check=False) for path, group in groups.items()
    }
    student, *teachers = (
        _Member(path, group, loaded[path], _side(config, group, loaded[path]))
        for path, group in groups.items()
    )
    train_set = load_split(config, "train")
    pool = shot_pool_of(config, train_set)
    examples = [example for example in train_set if example.answers][: args.samples]
    if not examples:
        raise UserError(f"data.source={config.data.source}: expected answers to look at, got none")
    mesh = devices.meshes(config)["student"]
    step = planning.abstract_step(config, {path: m.config for path, m in loaded.items()}, mesh)
    faults = 0
    for teacher in teachers:
        with console.status(f"looking at the student and {teacher.path}"):
            report = _report(config, student, teacher, examples, pool)
        if args.weights:
            report = _with_likelihoods(report, config, student, teacher, examples, pool)
        report = dataclasses.replace(report, bytes=step.bytes_per_device())
        say(preflight.markdown(report))
        faults += len(report.errors)
        if args.output:
            _write(report, locate(args.output), teacher.path)
    if faults:
        raise UserError(f"{faults} of the findings above are errors: training cannot work so")


def _report(
    config: RunConfig,
    student: _Member,
    teacher: _Member,
    examples: Sequence[Example],
    pool: Sequence[Example],
) -> Report:
    """What tokenizers, configs and examples show."""
    sides = student.side, teacher.side
    answers = [example.answers[0] for example in examples]
    vocabulary = preflight.vocabulary_facts(sides[0].tokenizer, sides[1].tokenizer)
    samples = preflight.sample_facts(
        examples,
        answers,
        *sides,
        pool=pool,
        seed=config.data.seed,
        skip_eos=(config.loss.skip_student_eos, config.loss.skip_teacher_eos),
    )
    found = [
        *preflight.side_findings(student.path, student.facts),
        *preflight.side_findings(teacher.path, teacher.facts),
        *preflight.pair_findings(student.facts, teacher.facts, vocabulary),
        *preflight.sample_findings(teacher.path, samples),
    ]
    aligned = [preflight.align_text(answer.strip(), *sides) for answer in answers[:MOST_DRAWN]]
    return Report(
        student.facts,
        teacher.facts,
        vocabulary,
        samples,
        bits_per_byte={},
        bytes={},
        findings=preflight.worst_first(found),
        # The one with the most to see.
        drawn=max(aligned, key=lambda text: sum(len(own) > 1 for own, _ in text.groups)),
    )


def _with_likelihoods(
    report: Report,
    config: RunConfig,
    student: _Member,
    teacher: _Member,
    examples: Sequence[Example],
    pool: Sequence[Example],
) -> Report:
    """With how well both models expect the answers; left out where they could not read them."""
    answers = [example.answers[0] for example in examples]
    sides = student.side, [teacher.side]
    read = pairs_or_reasons(examples, answers, *sides, pool=pool, seed=config.data.seed)
    pairs = [pair for pair in read if isinstance(pair, Pair)]
    if not pairs or any(finding.fault == "tokens_beyond" for finding in report.findings):
        return report
    by_id = {e.id: answer for e, answer in zip(examples, answers, strict=True)}
    size = sum(len(by_id[pair.id].strip().encode()) for pair in pairs)
    bits, found = {}, [*report.findings]
    for member, texts in (
        (student, [pair.student for pair in pairs]),
        (teacher, [pair.teachers[0] for pair in pairs]),
    ):
        mesh = devices.meshes(config)["student"]
        m = compose.load_model(member.path, member.group, mesh)
        readings = read_answers(m, texts, batch_size=config.eval.batch_size, mesh=mesh)
        nats = float(sum(each.nats.sum() for each in readings))
        bits[member.path] = bits_per_byte(nats, size)
        found += preflight.likelihood_findings(member.path, bits[member.path])
    return dataclasses.replace(report, bits_per_byte=bits, findings=preflight.worst_first(found))


def _side(config: RunConfig, group: BaseModelConfig, m: models.LoadedTokenizer) -> Side:
    """As training prompts it, but that a tokenizer without an end of text is no reason to stop."""
    side = compose.side_of(group, m, config.data)
    ends = m.tokenizer.eos_token_id is not None
    return dataclasses.replace(side, append_eos=side.append_eos and ends)


def _write(report: Report, directory: AnyPath, path: str) -> None:
    make_directory(directory)
    name = path.replace(".", "_")
    write_text(directory / f"{name}.md", f"{preflight.markdown(report)}\n![]({name}.png)\n")
    write_json(directory / f"{name}.json", preflight.to_json(report))
    with staged(directory / f"{name}.png") as file:
        preflight.draw(report.drawn, file)
    say(f"report: {directory / f'{name}.md'}")
