"""`uld-jax bench align`: the tokenizers and answers that it measures."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uld_jax.benchmark.alignment import measure_alignment
from uld_jax.data import load_examples
from uld_jax.errors import UserError
from uld_jax.models.gguf_tokenizer import tokenizer_from_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# As launch/fetch_models.sh and launch/fetch_tokenizers.sh name them.
TOKENIZERS = (
    "models/SmolLM2-135M-Instruct.Q4_1.gguf",
    "models/gemma-3-270m-q4_k_m.gguf",
    "tokenizers/npm/llama2",
    "tokenizers/npm/qwen3",
)


def prepare(args: argparse.Namespace, answers: int, repeats: int) -> Callable[[], dict[str, Any]]:
    """Loads tokenizers and answers.

    Args:
        args: Parsed flags.
        answers: Of each data set, the most to align.
        repeats: Timed rounds.

    Returns:
        What measures: see `measure_alignment`.

    Raises:
        UserError: Bad input of any kind.
    """
    cache = Path(os.environ.get("ULD_JAX_CACHE", Path.home() / ".cache" / "uld_jax"))
    sources = args.tokenizer or [str(cache / name) for name in TOKENIZERS]
    tokenizers = {}
    for source in sources:
        name = Path(source).name
        if name in tokenizers:
            raise UserError(f"--tokenizer={source}: another one is called {name!r}; rename it")
        tokenizers[name] = _read(Path(source))
    if len(tokenizers) < 2:
        raise UserError("--tokenizer: expected two or more, to align one with another")
    texts: list[str] = []
    for source in args.data or ["builtin"]:
        examples = load_examples(source, "train", manual_dir=args.manual_dir)
        step = max(1, len(examples) // answers)
        texts += [example.answers[0] for example in examples[::step][:answers]]
    return partial(measure_alignment, tokenizers, texts, repeats=repeats)


def _read(path: Path) -> "PreTrainedTokenizerFast":
    """A tokenizer alone: unlike a model's it needs no config.json."""
    import transformers

    if path.suffix == ".gguf" and path.is_file():
        return tokenizer_from_gguf(path)
    if not (path / "tokenizer.json").is_file():
        raise UserError(
            f"--tokenizer={path}: expected a .gguf file or a directory with tokenizer.json; "
            "launch/fetch_models.sh and launch/fetch_tokenizers.sh fetch those used by default"
        )
    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
