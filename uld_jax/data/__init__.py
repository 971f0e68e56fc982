"""From question-answer files to training batches; numpy only, no accelerator is started."""

from uld_jax.data.align import align_spans, positional_pairs
from uld_jax.data.answers import Answer, AnswerWriter, verify_answers
from uld_jax.data.fingerprints import (
    fingerprint_examples,
    fingerprint_prompts,
    fingerprint_tokenizer,
)
from uld_jax.data.loader import Loader, make_loader
from uld_jax.data.offsets import byte_offsets, decoded_offsets
from uld_jax.data.pack import collate
from uld_jax.data.prompts import (
    TASKS,
    Prompt,
    chat_template,
    draw_shots,
    first_line,
    render,
    shot_pool,
)
from uld_jax.data.signal import Signal, pad_signals, truncate_signal
from uld_jax.data.signal_codec import decode_signal, encode_signal
from uld_jax.data.signal_store import SignalStore
from uld_jax.data.signal_writer import SignalWriter
from uld_jax.data.tasks import Example, load_examples, task_of
from uld_jax.data.tokenize import (
    Encoded,
    Pair,
    Side,
    encode,
    encode_pairs,
    encode_prompts,
    pairs_or_reasons,
)
from uld_jax.data.vocabulary import MatchedVocabulary, TokenBytes, match_vocabularies

__all__ = [
    "TASKS",
    "Answer",
    "AnswerWriter",
    "Encoded",
    "Example",
    "Loader",
    "MatchedVocabulary",
    "Pair",
    "Prompt",
    "Side",
    "Signal",
    "SignalStore",
    "SignalWriter",
    "TokenBytes",
    "align_spans",
    "byte_offsets",
    "chat_template",
    "collate",
    "decode_signal",
    "decoded_offsets",
    "draw_shots",
    "encode",
    "encode_pairs",
    "encode_prompts",
    "encode_signal",
    "fingerprint_examples",
    "fingerprint_prompts",
    "fingerprint_tokenizer",
    "first_line",
    "load_examples",
    "make_loader",
    "match_vocabularies",
    "pad_signals",
    "pairs_or_reasons",
    "positional_pairs",
    "render",
    "shot_pool",
    "task_of",
    "truncate_signal",
    "verify_answers",
]
