"""`uld-jax generate`: the teacher's answers to a data set, as a TFDS data set or JSON lines."""

import argparse
import json
import shutil
from pathlib import Path

import jax

from uld_jax.cli import compose
from uld_jax.cli.answers import answer_split, dropped_message, wait_until_finished
from uld_jax.cli.compose import say
from uld_jax.config import RunConfig
from uld_jax.data import AnswerWriter, Example, load_examples, verify_answers
from uld_jax.errors import UserError
from uld_jax.files import write_text
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
    output = Path(args.output)
    as_lines = output.suffix == ".jsonl"
    directory = output.with_name(f"{output.name}.shards") if as_lines else output
    if as_lines and output.exists():
        if not directory.is_dir():
            raise UserError(f"--output={output}: exists; choose another file")
        if is_first():
            shutil.rmtree(directory)  # killed after its last step but one
        say(f"answers: {output}")
        return
    mesh = compose.mesh_of(config.mesh, devices=jax.local_devices())
    split = config.generate.split
    examples = compose.load_split(config, split)
    pool = examples
    if split != "train" and config.teacher.shots:
        pool = compose.load_split(config, "train")
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


def _finish(config: RunConfig, writer: AnswerWriter, directory: Path) -> dict:
    """The manifest."""
    if writer.finished:
        return verify_answers(directory)
    counts = writer.counts()
    if not counts["answers"]:
        asked = sum(counts["dropped"].values()) // config.generate.samples
        message = dropped_message(config, counts)
        raise UserError(f"none of {asked} questions has an answer; {message}")
    return writer.finish()


def _join(directory: Path, split: str, output: Path) -> None:
    """Turns the finished directory into JSON lines."""
    lines = map(_line, load_examples(f"generated:{directory}", split))
    write_text(output, "".join(lines))
    shutil.rmtree(directory)


def _line(example: Example) -> str:
    answer = example.answers[0]
    record = (
        {"id": example.id, "prompt": example.question, "completion": answer}
        if example.kind == "completion"
        else {
            "id": example.id,
            "title": example.title,
            "context": example.context,
            "question": example.question,
            "answer": answer,
        }
    )
    return json.dumps(record, ensure_ascii=False) + "\n"
