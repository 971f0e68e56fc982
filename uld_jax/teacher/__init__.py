"""What the teacher gives: answers to train on, and signals from a server or devices of its own."""

from uld_jax.teacher.answer_provenance import answer_provenance
from uld_jax.teacher.build_cache import SignalOptions, SignalReader, Work, write_signals
from uld_jax.teacher.build_served import write_served_signals
from uld_jax.teacher.completions import CompletionsClient, Server
from uld_jax.teacher.echo import ServedSignal, ServedText
from uld_jax.teacher.generate import Answerer, Recipe, generate_answers
from uld_jax.teacher.provenance import open_cache, provenance, read_answers, teacher_texts
from uld_jax.teacher.server import FetchOptions, served_signals
from uld_jax.teacher.server_check import ServerCheck, check_server
from uld_jax.teacher.signals import TopProbabilities, top_probabilities
from uld_jax.teacher.stream import StreamedTeacher, StreamOptions

__all__ = [
    "Answerer",
    "CompletionsClient",
    "FetchOptions",
    "Recipe",
    "ServedSignal",
    "ServedText",
    "Server",
    "ServerCheck",
    "SignalOptions",
    "SignalReader",
    "StreamOptions",
    "StreamedTeacher",
    "TopProbabilities",
    "Work",
    "answer_provenance",
    "check_server",
    "generate_answers",
    "open_cache",
    "provenance",
    "read_answers",
    "served_signals",
    "teacher_texts",
    "top_probabilities",
    "write_served_signals",
    "write_signals",
]
