"""`uld-jax export`: a run's newest checkpoint as a Hugging Face directory."""

import argparse

from uld_jax import models
from uld_jax.cli import compose, devices
from uld_jax.cli.compose import say


def run(args: argparse.Namespace) -> None:
    """Writes model.safetensors, config.json and the tokenizer.

    Args:
        args: Parsed flags.

    Raises:
        UserError: No checkpoint, or the output directory is not empty.
    """
    config = compose.run_config(args)
    mesh = devices.meshes(config)["student"]
    student = compose.load_student(config, args.workdir, mesh)
    models.save_pretrained(student, args.output)
    say(f"student (Hugging Face format): {args.output}")
