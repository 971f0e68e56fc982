"""Exceptions with a meaning for the command line: your input, not our code; and: run me again."""


class UserError(Exception):
    """A problem the user can mend: the command line prints it as one line and exits with 2.

    The message says what is wrong, where, what was expected, what was found and how to mend it.

    Example:
        >>> from uld_jax.errors import UserError
        >>> raise UserError("data.jsonl:3: field 'question' is missing")
        Traceback (most recent call last):
        ...
        uld_jax.errors.UserError: data.jsonl:3: field 'question' is missing
    """


class Preempted(Exception):
    """A run was asked to stop, and has saved what it needs to go on.

    Args:
        step: The last optimizer step that is saved.

    Example:
        >>> Preempted(12).step
        12
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped on request after step {step}, which is saved")
        self.step = step
