"""`uld-jax generate`: the teacher's answers to the training questions, as JSON lines."""

import argparse
import json
from pathlib import Path

from uld_jax.cli import compose
from uld_jax.cli.compose import progress_bar, say
from uld_jax.errors import UserError
from uld_jax.files import write_text
from uld_jax.sharding import make_mesh
from uld_jax.teacher import generate_answers


def run(args: argparse.Namespace) -> None:
    """Writes one line an example: a file that `--config.data.source=jsonl:FILE` reads.

    Args:
        args: Parsed flags.

    Raises:
        UserError: Bad input of any kind.
    """
    config = compose.run_config(args)
    output = Path(args.output)
    if output.exists():
        raise UserError(f"--output={output}: exists; choose another file")
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    examples = compose.load_split(config, "train")
    teacher = compose.load_model("teacher", config.teacher, mesh)
    with progress_bar("the teacher answers", len(examples)) as progress:
        answers = generate_answers(
            teacher,
            examples,
            compose.side_of(config.teacher, teacher),
            pool=examples,
            seed=config.data.seed,
            max_new_tokens=config.teacher.max_new_tokens,
            batch_size=config.teacher.batch_size,
            progress=progress,
        )
    kept = [example for example in examples if answers.get(example.id)]
    too_long = len(examples) - len(answers)
    message = compose.limit_message(
        [
            ("with an empty answer", len(answers) - len(kept)),
            (f"over teacher.max_length={config.teacher.max_length}", too_long),
        ]
    )
    if not kept:
        raise UserError(f"none of {len(examples)} questions has an answer; {message}")
    lines = [
        json.dumps(
            {"id": e.id, "prompt": e.question, "completion": answers[e.id]}
            if e.kind == "completion"
            else {
                "id": e.id,
                "title": e.title,
                "context": e.context,
                "question": e.question,
                "answer": answers[e.id],
            },
            ensure_ascii=False,
        )
        for e in kept
    ]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, "".join(line + "\n" for line in lines))
    say(f"{len(kept)} answers: {output}" + (f"; {message}" if message else ""))
