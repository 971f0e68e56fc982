"""`uld-jax generate`: the teacher's answers to a data set, as a TFDS data set or JSON lines."""

import argparse
import json

import jax

from uld_jax.cli import compose
from uld_jax.cli.answers import answer_split, dropped_message, wait_until_finished
from uld_jax.cli.compose import say
from uld_jax.cli.devices import own_mesh
from uld_jax.cli.examples import load_split, shot_pool_of
from uld_jax.config import RunConfig
from uld_jax.data import AnswerWriter, Example, load_examples, verify_answers
from uld_jax.errors import UserError
from uld_jax.files import AnyPath, locate, remove_tree, write_text
from uld_jax.processes import is_first


def run(args: argparse.Namespace) -> None:
    """Writes what `--config.data.source=generated:DIR`, or jsonl:FILE, reads.

    A killed command goes on where it was when it is given again. Each of several processes has
    the teacher on its own devices and answers its share of the shards.

    Args:
        args: Parsed flags.

    Raises:
        UserError: Bad input of any kind.
    """
    config = compose.run_config(args, device_count=jax.local_device_count())
    output = locate(args.output)
    as_lines = output.suffix == ".jsonl"
    directory = output.with_name(f"{output.name}.shards") if as_lines else output
    if as_lines and output.exists():
        if not directory.is_dir():
            raise UserError(f"--output={output}: exists; choose another file")
        if is_first():
            remove_tree(directory)  # killed after its last step but one
        say(f"answers: {output}")
        return
    mesh = own_mesh(config.mesh)
    split = config.generate.split
    examples = load_split(config, split)
    pool = examples
    if config.teacher.shots:
        train_set = examples if split == "train" else load_split(config, "train")
        pool = shot_pool_of(config, train_set)
    writer = answer_split(
        config,
        compose.load_model("teacher", config.teacher, mesh),
        examples,
        pool=pool,
        directory=directory,
        split=split,
        samples=config.generate.samples,
        title="the teacher answers",
        apart=True,
    )
    if not is_first():
        wait_until_finished(writer, directory)
        return
    counts = _finish(config, writer, directory)
    if as_lines:
        _join(directory, split, output)
    message = dropped_message(config, counts)
    cut = f", {counts['cut']} of them cut" if counts["cut"] else ""
    say(
        f"{counts['answers']} answers of {counts['tokens']} tokens{cut}: {output}"
        + (f"; {message}" if message else "")
    )


def _finish(config: RunConfig, writer: AnswerWriter, directory: AnyPath) -> dict:
    """The manifest."""
    if writer.finished:
        return verify_answers(directory)
    counts = writer.counts()
    if not counts["answers"]:
        asked = sum(counts["dropped"].values()) // config.generate.samples
        message = dropped_message(config, counts)
        raise UserError(f"none of {asked} questions has an answer; {message}")
    return writer.finish()


def _join(directory: AnyPath, split: str, output: AnyPath) -> None:
    """Turns the finished directory into JSON lines."""
    lines = map(_line, load_examples(f"generated:{directory}", split))
    write_text(output, "".join(lines))
    remove_tree(directory)


def _line(example: Example) -> str:
    answer = example.answers[0]
    if example.kind == "chat":
        messages = json.loads(example.question)
        record = {"messages": [*messages, {"role": "assistant", "content": answer}]}
    elif example.kind == "completion":
        record = {"prompt": example.question, "completion": answer}
    else:
        record = {
            "title": example.title,
            "context": example.context,
            "question": example.question,
            "answer": answer,
        }
    record = {"id": example.id, **record}
    return json.dumps(record, ensure_ascii=False) + "\n"
