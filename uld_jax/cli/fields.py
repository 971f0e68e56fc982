"""`uld-jax fields`: every config field with its type and default."""

import argparse
import dataclasses

from uld_jax.config import RunConfig


def run(args: argparse.Namespace) -> None:
    """Prints the fields, group by group, with each group's documentation.

    Args:
        args: Unused.
    """
    for group, value in RunConfig().groups().items():
        print(f"\n{group}: {type(value).__doc__}")
        for field in dataclasses.fields(value):
            kind = field.type if isinstance(field.type, str) else field.type.__name__
            default = getattr(value, field.name)
            print(f"  --config.{group}.{field.name}={default}  ({kind})")
    print("\nextra_teachers.0, extra_teachers.1, ...: more teachers, with the fields of teacher.")
