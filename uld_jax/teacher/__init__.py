"""What the teacher gives: answers to train on."""

from uld_jax.teacher.generate import generate_answers

__all__ = ["generate_answers"]
