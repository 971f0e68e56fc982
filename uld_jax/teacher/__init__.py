"""What the teacher gives: answers to train on, and the signals of one that a server runs."""

from uld_jax.teacher.completions import CompletionsClient, Server
from uld_jax.teacher.echo import ServedSignal, ServedText
from uld_jax.teacher.generate import generate_answers
from uld_jax.teacher.server import FetchOptions, served_signals
from uld_jax.teacher.server_check import ServerCheck, check_server

__all__ = [
    "CompletionsClient",
    "FetchOptions",
    "ServedSignal",
    "ServedText",
    "Server",
    "ServerCheck",
    "check_server",
    "generate_answers",
    "served_signals",
]
