"""What a teacher cache follows from: written beside its signals, and compared before training.

Each field has a name that says what to change. A name of the config is its path. `recorded.`
fields cannot be known where the weights are not: `open_cache` does not compare them, a cache that
is continued does.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from uld_jax.config import RunConfig
from uld_jax.data import (
    Encoded,
    Example,
    Pair,
    Side,
    SignalStore,
    fingerprint_prompts,
    fingerprint_tokenizer,
    pairs_or_reasons,
)
from uld_jax.data.shards import MANIFEST, differences, read_json
from uld_jax.data.signal_store import ANSWERS, CACHE
from uld_jax.errors import UserError
from uld_jax.files import AnyPath, locate, make_directory, write_json
from uld_jax.models import EncoderDecoderConfig, LoadedModel, LoadedTokenizer

Provenance = dict[str, str | int | float | bool]
RECORDED = "recorded."
# Texts tokenised together.
BATCH = 512

_MEND = {
    "teacher": "set --config.teacher.source to the cache's teacher",
    "model": "set --config.teacher.source to the cache's teacher",
    "tokenizer": "take the tokenizer that the cache was made with",
    "data": "set --config.data.source and --config.data.train_examples to the cache's",
    "answers": "set --config.data.answers as it was when the cache was made",
    "prompts": "prompts are worded or shortened otherwise: cache them anew",
}


def teacher_texts(
    examples: Sequence[Example],
    answers: Mapping[str, str],
    side: Side,
    *,
    pool: Sequence[Example],
    seed: int,
) -> list[Encoded | str]:
    """What the teacher reads of each example.

    Args:
        examples: The training split.
        answers: Answer by example id; an example without one is left out.
        side: How the teacher is prompted.
        pool: Examples that shots are drawn from.
        seed: Decides which shots.

    Returns:
        For each example prompt and answer, or why it is left out: a field of `data.Dropped`.

    Raises:
        UserError: A chat template is missing, or there are too few examples for the shots.
    """
    answered = [example for example in examples if example.id in answers]
    found: dict[str, Encoded | str] = {}
    for start in range(0, len(answered), BATCH):
        batch = answered[start : start + BATCH]
        texts = [answers[example.id] for example in batch]
        # The student is not asked, a cache serves any: the teacher stands in its place.
        pairs = pairs_or_reasons(batch, texts, side, [], pool=pool, seed=seed)
        for example, pair in zip(batch, pairs, strict=True):
            found[example.id] = pair.student if isinstance(pair, Pair) else pair
    return [found.get(example.id, "too_long_teacher") for example in examples]


def provenance(
    config: RunConfig,
    m: LoadedModel | LoadedTokenizer,
    side: Side,
    examples: Sequence[Example],
    answers: Mapping[str, str],
    texts: Sequence[Encoded | str],
) -> Provenance:
    """Everything that a cache's signals depend on and that a run can tell without the weights.

    Args:
        config: The run.
        m: The teacher, or its tokenizer and config alone.
        side: How it is prompted.
        examples: The training split.
        answers: Answer by example id.
        texts: From `teacher_texts`.

    Returns:
        A value a field; texts as the first half of their SHA-256.
    """
    kept = [(e.id, t) for e, t in zip(examples, texts, strict=True) if isinstance(t, Encoded)]
    arrays = ([id_, *(a.tolist() for a in (t.tokens, t.answer, t.encoder))] for id_, t in kept)
    return _setup(config, m, side, examples) | {
        "answers": _hash([e.id, answers.get(e.id)] for e in examples),
        "prompts": _hash(arrays),
    }


def _setup(
    config: RunConfig, m: LoadedModel | LoadedTokenizer, side: Side, examples: Sequence[Example]
) -> Provenance:
    """The fields that answers depend on as well, where the teacher gives them."""
    c, teacher = m.config, config.teacher
    layers = c.decoder_layers if isinstance(c, EncoderDecoderConfig) else c.layers
    fields: Provenance = {
        "teacher": Path(teacher.source).name if _is_path(teacher.source) else teacher.source,
        "model": f"{c.family}, vocabulary {c.vocab_size}, width {c.width}, {layers} layers, "
        f"soft-cap {c.logit_softcap:g}",
        "tokenizer": fingerprint_tokenizer(m.tokenizer),
        "data": _hash([e.id, e.kind, e.title, e.context, e.question] for e in examples),
        "loss.teacher_temperature": float(config.loss.teacher_temperature),
        "teacher.chat": side.chat,
    }
    names = ["shots", "max_length", "append_eos", "dtype", "param_dtype", "quantize"]
    fields |= {f"teacher.{name}": getattr(teacher, name) for name in names}
    if side.shots:
        # It decides which shots, and nothing else here.
        fields["data.seed"] = config.data.seed
    return fields


def open_cache(directory: str | os.PathLike[str], expected: Provenance) -> SignalStore:
    """Opens a finished cache, once it is known to be of this run's teacher, data and prompts.

    Args:
        directory: Of the cache.
        expected: From `provenance`.

    Returns:
        The cache, each byte verified.

    Raises:
        UserError: It was made from something else, or is unfinished or damaged.
    """
    path = locate(directory) / MANIFEST
    if path.is_file():
        _compare(directory, read_json(path, CACHE).get("provenance", {}), expected)
    return SignalStore(directory)


def save_answers(
    directory: AnyPath,
    answers: Mapping[str, str],
    config: RunConfig,
    m: LoadedModel | LoadedTokenizer,
    side: Side,
    examples: Sequence[Example],
) -> None:
    """Keeps the teacher's answers in its cache's directory, for runs that have no teacher.

    Args:
        directory: Of the cache; made if need be.
        answers: Answer by example id.
        config: The run.
        m: The teacher.
        side: How it is prompted.
        examples: The training split.
    """
    make_directory(directory)
    made_from = _answers_setup(config, m, side, examples)
    write_json(directory / ANSWERS, {"made_from": made_from, "answers": dict(answers)})


def read_answers(
    directory: str | os.PathLike[str],
    config: RunConfig,
    m: LoadedModel | LoadedTokenizer,
    side: Side,
    examples: Sequence[Example],
) -> dict[str, str]:
    """The teacher's answers in a cache's directory.

    Args:
        directory: Of the cache.
        config: The run, with data.answers = teacher.
        m: The teacher, or its tokenizer and config alone.
        side: How it is prompted.
        examples: The training split.

    Returns:
        Answer by example id.

    Raises:
        UserError: There are none, or they are of something else.
    """
    path = locate(directory) / ANSWERS
    if not path.is_file():
        raise UserError(
            f"{path}: no such file, expected the teacher's answers: run `uld-jax cache` with "
            "--config.data.answers=teacher, or set --config.data.answers=gold for a cache of the "
            "data set's own"
        )
    content = read_json(path, CACHE)
    if not content.keys() >= {"made_from", "answers"}:
        raise UserError(f"{path}: expected made_from and answers, got {sorted(content)}")
    _compare(path, content["made_from"], _answers_setup(config, m, side, examples))
    return content["answers"]


def _answers_setup(
    config: RunConfig, m: LoadedModel | LoadedTokenizer, side: Side, examples: Sequence[Example]
) -> Provenance:
    fields = _setup(config, m, side, examples)
    # Greedy answers are the same at any temperature, and are given without an end.
    for unused in ("loss.teacher_temperature", "teacher.append_eos"):
        del fields[unused]
    words = {"chat": side.chat, "task": side.task, "titles": side.titles}
    return fields | {
        "prompts": fingerprint_prompts(m.tokenizer, **words),
        "teacher.max_new_tokens": config.teacher.max_new_tokens,
    }


def _compare(where: str | os.PathLike[str], found: Mapping[str, Any], expected: Provenance) -> None:
    known = {name: value for name, value in found.items() if not name.startswith(RECORDED)}
    different = differences(known, expected)
    if not different:
        return
    names = [text.split(" ", 1)[0] for text in different]
    if len(different) > 1 and "prompts" in names:
        # They follow from the others.
        del different[names.index("prompts")], names[names.index("prompts")]
    ways = [
        _MEND.get(name) or f"set --config.{name}={known[name]}"
        for name in names
        if name in _MEND or name in known
    ]
    raise UserError(
        f"{where}: this teacher cache was made from something else: {'; '.join(different)}: "
        f"{', '.join(dict.fromkeys(ways))}; or run `uld-jax cache` into another directory"
    )


def _is_path(source: str) -> bool:
    """Whether it names a place on this machine, not a repository on the hub."""
    return source.endswith(".gguf") or Path(source).expanduser().exists() or source.count("/") != 1


def _hash(values: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()[:32]
