"""The one exception that means "your input, not our code"."""


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
