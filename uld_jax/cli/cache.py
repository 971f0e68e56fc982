"""`uld-jax cache`: the teacher's signals on the training data, for runs without a teacher."""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from uld_jax import models
from uld_jax.cli import compose
from uld_jax.cli.compose import progress_bar, say
from uld_jax.cli.devices import own_mesh
from uld_jax.cli.examples import load_split, shot_pool_of
from uld_jax.config import RunConfig
from uld_jax.data import Encoded, Example, Side, SignalWriter
from uld_jax.data.signal_store import ANSWERS
from uld_jax.errors import UserError
from uld_jax.files import AnyPath, locate
from uld_jax.processes import is_first, wait_for_all
from uld_jax.sharding import fold_sequence
from uld_jax.teacher import (
    CompletionsClient,
    Server,
    SignalOptions,
    Work,
    generate_answers,
    write_served_signals,
    write_signals,
)
from uld_jax.teacher.provenance import (
    RECORDED,
    provenance,
    read_answers,
    save_answers,
    teacher_texts,
)


@dataclasses.dataclass
class _Job:
    """What the stages share; the weights are loaded when the first of them is needed."""

    config: RunConfig
    output: AnyPath
    examples: Sequence[Example]
    known: models.LoadedTokenizer
    mesh: Mesh
    loaded: models.LoadedModel | None = None

    @property
    def side(self) -> Side:
        return compose.side_of(self.config.teacher, self.known, self.config.data)

    @property
    def about(self) -> tuple[RunConfig, models.LoadedTokenizer, Side, Sequence[Example]]:
        return self.config, self.known, self.side, self.examples

    @functools.cached_property
    def pool(self) -> Sequence[Example]:
        return shot_pool_of(self.config, self.examples)

    def teacher(self) -> models.LoadedModel:
        if self.loaded is None:
            self.loaded = compose.load_model("teacher", self.config.teacher, self.mesh)
        return self.loaded


def run(args: argparse.Namespace) -> None:
    """Fills the output directory, or continues one that was left unfinished.

    Args:
        args: Parsed flags.

    Raises:
        UserError: Bad input of any kind.
    """
    config = compose.run_config(args)
    if config.teacher.server and config.data.answers == "teacher":
        raise UserError(
            "data.answers: expected gold where teacher.server is set, for a server is asked about "
            "answers and not for them, got teacher; set --config.data.answers=gold and "
            "--config.data.source to questions with the answers to train on"
        )
    output = locate(args.output)
    known = models.load_tokenizer(config.teacher.source)
    examples = load_split(config, "train")
    job = _Job(config, output, examples, known, fold_sequence(own_mesh(config.mesh)))
    answers = _answers(job)
    texts = teacher_texts(examples, answers, job.side, pool=job.pool, seed=config.data.seed)
    left_out = [
        ("with an empty answer", texts.count("empty_answer")),
        (
            f"over teacher.max_length={config.teacher.max_length}",
            sum(isinstance(text, str) for text in texts) - texts.count("empty_answer"),
        ),
    ]
    message = compose.limit_message(left_out)
    if not any(isinstance(text, Encoded) for text in texts):
        raise UserError(
            f"none of {len(examples)} examples is left; {message}: set "
            "--config.teacher.max_length higher, or --config.teacher.shots lower"
        )
    if message:
        say(message)
    writer = _writer(job, provenance(*job.about, answers, texts))
    work = Work()
    if not config.teacher.server:
        work = _fill(job, writer, texts)
    elif is_first():
        _ask_server(job, writer, texts)
    wait_for_all("signals")
    if is_first():
        _report(writer.finish(), work, output)


def _answers(job: _Job) -> dict[str, str]:
    """The data set's answers, or the teacher's, which are kept beside the signals."""
    if job.config.data.answers == "gold":
        return {example.id: example.answers[0] for example in job.examples}
    path = job.output / ANSWERS
    if not path.is_file() and is_first():
        if job.output.exists() and not (job.output.is_dir() and _is_free(job.output)):
            raise UserError(
                f"--output={job.output}: expected an empty directory or a teacher cache with "
                f"{ANSWERS}, found something else; choose another directory"
            )
        with progress_bar("the teacher answers", len(job.examples)) as progress:
            answers = generate_answers(
                job.teacher(),
                job.examples,
                job.side,
                pool=job.pool,
                seed=job.config.data.seed,
                max_new_tokens=job.config.teacher.max_new_tokens,
                batch_size=job.config.teacher.batch_size,
                progress=progress,
            )
        save_answers(job.output, answers, *job.about)
    wait_for_all("answers")
    return read_answers(job.output, *job.about)


def _is_free(directory: AnyPath) -> bool:
    return all(path.name.startswith(".") for path in directory.iterdir())


def _writer(job: _Job, about: dict[str, Any]) -> SignalWriter:
    teacher = job.config.teacher
    recorded: dict[str, Any] = {
        "weights": f"{teacher.server_model}, the {teacher.server_top_k} likeliest tokens"
        if teacher.server
        else models.weights_fingerprint(teacher.source),
        # They decide how sums are rounded.
        "batch_size": teacher.batch_size,
        "chunk_size": job.config.loss.chunk_size,
        "cache_ids": teacher.cache_ids,
    }

    def claim() -> SignalWriter:
        return SignalWriter(
            job.output,
            about | {RECORDED + name: value for name, value in recorded.items()},
            total=len(job.examples),
            epsilon=teacher.cache_epsilon,
            cap=teacher.cache_cap,
            shard_size=teacher.cache_shard_size,
        )

    if is_first():
        # The first makes the directory; then the others find it theirs.
        writer = claim()
        wait_for_all("directory")
        return writer
    wait_for_all("directory")
    return claim()


def _fill(job: _Job, writer: SignalWriter, texts: Sequence[Encoded | str]) -> Work:
    rank, count = jax.process_index(), jax.process_count()
    mine = [shard for shard in writer.missing_shards() if shard % count == rank]
    if not mine:
        return Work()
    config = job.config
    options = SignalOptions(
        epsilon=config.teacher.cache_epsilon,
        cap=config.teacher.cache_cap,
        temperature=config.loss.teacher_temperature,
        ids=config.teacher.cache_ids,
        batch_size=config.teacher.batch_size,
        chunk_size=config.loss.chunk_size,
    )
    teacher = job.teacher()
    total = sum(len(writer.examples_of(shard)) for shard in mine)
    with progress_bar("the teacher reads", total) as progress:
        return write_signals(
            teacher,
            [example.id for example in job.examples],
            texts,
            writer,
            options,
            mesh=job.mesh,
            shards=mine,
            progress=progress,
        )


def _ask_server(job: _Job, writer: SignalWriter, texts: Sequence[Encoded | str]) -> None:
    teacher = job.config.teacher
    server = Server(
        teacher.server,
        teacher.server_model,
        top_k=teacher.server_top_k,
        api_key_env=teacher.server_key_env,
        concurrency=teacher.server_concurrency,
        retries=teacher.server_retries,
    )
    asked = sum(
        isinstance(texts[i], Encoded)
        for shard in writer.missing_shards()
        for i in writer.examples_of(shard)
    )
    with CompletionsClient(server) as client, progress_bar("the server reads", asked) as progress:
        checked, failed = write_served_signals(
            client,
            [example.id for example in job.examples],
            texts,
            writer,
            job.output,
            tokenizer=job.known.tokenizer,
            epsilon=teacher.cache_epsilon,
            cap=teacher.cache_cap,
            max_failed_fraction=teacher.server_max_failed,
            progress=progress,
        )
    say(f"{client.address}: {checked}")
    for id_, reason in failed.items():
        say(f"no signal for {id_}: {reason}")


def _report(manifest: dict[str, Any], work: Work, output: AnyPath) -> None:
    if work.seconds:
        say(
            f"read {work.tokens:,} tokens, {work.positions:,} of them answers, in "
            f"{work.seconds:.0f} s: {work.tokens / work.seconds:,.0f} tokens/s"
        )
    positions = max(manifest["positions"], 1)
    say(
        f"{manifest['examples']:,} examples, {manifest['positions']:,} answer positions: "
        f"{manifest['record_bytes'] / positions:.1f} bytes each, "
        f"{manifest['bytes'] / positions:.1f} with the files' padding; "
        f"{manifest['mean_count']:,.0f} probabilities on average"
    )
    say(
        f"certified error of ULD: {manifest['mean_error']:.2g} on average, "
        f"{manifest['max_error']:.2g} at most; {manifest['over_bound']} positions over "
        f"{manifest['error_bound']:.2g}, which teacher.cache_cap={manifest['cap']} cuts short"
    )
    say(f"cache: {output}")
