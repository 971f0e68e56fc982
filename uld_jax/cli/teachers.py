"""What a run has of its teachers: models, or their tokenizers and what they have said before."""

import dataclasses
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from uld_jax import models
from uld_jax.cli import compose
from uld_jax.cli.compose import say
from uld_jax.config import RunConfig
from uld_jax.data import Example, Side, SignalStore
from uld_jax.errors import UserError
from uld_jax.losses import Comparison
from uld_jax.teacher import StreamedTeacher, StreamOptions
from uld_jax.teacher.provenance import open_cache, provenance, read_answers, teacher_texts
from uld_jax.train import make_comparison

Teacher = models.LoadedModel | models.LoadedTokenizer


def load_teachers(config: RunConfig, meshes: Mapping[str, Mesh]) -> list[Teacher]:
    """Loads every teacher, or of one whose signals are cached the tokenizer alone.

    Args:
        config: The run.
        meshes: Where parameters go, by the path of the teacher's config.

    Returns:
        As many as `config.teachers`.
    """
    return [
        models.load_tokenizer(each.source)
        if each.mode == "cache"
        else compose.load_model(name, each, meshes[name])
        for name, each in config.teacher_groups().items()
    ]


def cached_answers(
    config: RunConfig, teacher: Teacher, examples: Sequence[Example]
) -> dict[str, str] | None:
    """The answers to train on, where they are known without asking the teacher.

    Args:
        config: The run.
        teacher: The one that writes answers.
        examples: The training split.

    Returns:
        Answer by example id; None where the teacher has yet to be asked.

    Raises:
        UserError: A cache that is to have them has none, or others.
    """
    if config.data.answers == "gold":
        return {example.id: example.answers[0] for example in examples}
    if config.teacher.mode != "cache":
        return None
    side = compose.side_of(config.teacher, teacher, config.data)
    return read_answers(config.teacher.cache, config, teacher, side, examples)


def open_signals(
    config: RunConfig,
    teachers: Sequence[Teacher],
    sides: Sequence[Side],
    examples: Sequence[Example],
    answers: Mapping[str, str],
    pool: Sequence[Example],
) -> list[SignalStore | None]:
    """Opens the caches, each known to be of its teacher, of these examples and answers.

    Args:
        config: The run.
        teachers: From `load_teachers`.
        sides: How each is prompted.
        examples: The training split.
        answers: Answer by example id.
        pool: Examples that shots are drawn from.

    Returns:
        For each teacher its cache; None for one that is asked.

    Raises:
        UserError: A cache is of something else, unfinished or damaged.
    """
    stores: list[SignalStore | None] = []
    for each, teacher, side in zip(config.teachers, teachers, sides, strict=True):
        if each.mode != "cache":
            stores.append(None)
            continue
        texts = teacher_texts(examples, answers, side, pool=pool, seed=config.data.seed)
        own = dataclasses.replace(config, teacher=each)
        expected = provenance(own, teacher, side, examples, answers, texts)
        store = open_cache(each.cache, expected)
        if config.loss.distance != "uld" and not store.id_count:
            raise UserError(
                f"{each.cache}: this teacher cache keeps no tokens by id, which loss.distance="
                f"{config.loss.distance} is about: run `uld-jax cache "
                "--config.teacher.cache_ids=64` into another directory"
            )
        stores.append(store)
    return stores


def compared_by(
    config: RunConfig, student: models.LoadedModel, teachers: Sequence[Teacher]
) -> list[Comparison | None]:
    """What the student is compared with each teacher by; says how many tokens both have.

    Args:
        config: The run.
        student: The student.
        teachers: From `load_teachers`.

    Returns:
        One a teacher, None for ULD.

    Raises:
        UserError: The vocabularies share no token, or a package is missing.
    """
    found = []
    for teacher in teachers:
        comparison = make_comparison(config.loss, student.tokenizer, teacher.tokenizer)
        ids = getattr(comparison, "student_ids", None)
        if ids is not None:
            say(f"{config.loss.distance}: {ids.size:,} tokens are in both vocabularies")
        found.append(comparison)
    return found


def taught_from(
    config: RunConfig, teachers: Sequence[Teacher], meshes: Mapping[str, Mesh]
) -> list[models.Decoder | StreamedTeacher | None]:
    """What the training loop has of each teacher.

    Args:
        config: The run.
        teachers: From `load_teachers`.
        meshes: The student's, and each teacher's by the path of its config.

    Returns:
        A model beside the student, one that streams from devices of its own, or None for a cache.
    """
    found: list[models.Decoder | StreamedTeacher | None] = []
    rows = config.data.batch_size // config.train.accumulation
    for (name, each), teacher in zip(config.teacher_groups().items(), teachers, strict=True):
        if not isinstance(teacher, models.LoadedModel):
            found.append(None)
        elif each.mode != "stream":
            found.append(teacher.model)
        else:
            options = StreamOptions(
                depth=each.stream_depth,
                batch_size=each.stream_batch_size or rows,
                top_k=each.stream_top_k,
                temperature=config.loss.teacher_temperature,
                chunk_size=config.loss.chunk_size,
            )
            own = {"mesh": meshes[name], "student_mesh": meshes["student"]}
            found.append(StreamedTeacher(teacher.model, options, **own))
    return found
