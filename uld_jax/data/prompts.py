"""How a question is put to a model, and how its answer is read."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from uld_jax.data.records import Example
from uld_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INSTRUCTION = "Answer each question in a few words, taken from its context where there is one."

ChatFn = Callable[[list[dict[str, str]]], str]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to be continued: the whole training text is text + separator + answer.

    The separator is apart because most tokenizers join a blank to the word after it: a text
    that ends in a blank would be tokenised unlike the text of training.

    Attributes:
        text: What the model is given.
        separator: What stands between the text and its answer.
    """

    text: str
    separator: str


def render(
    example: Example, *, shots: Sequence[Example] = (), chat: ChatFn | None = None
) -> Prompt:
    """Write the prompt of one example.

    Args:
        example: The item to be answered.
        shots: Answered items to show first, in this order, each with its first answer.
        chat: Applies a model's chat template to messages (see `chat_template`); None writes
            plain text for a base model.

    Returns:
        The prompt; its separator is " " for a plain question and "" otherwise.

    Raises:
        UserError: A completion is to have shots; its prompt is the whole text.

    Example:
        >>> example = Example("0", "qa", "Oslo is in Norway.", "Where is Oslo?", ("Norway",), "")
        >>> print(render(example).text)
        Answer each question in a few words, taken from its context where there is one.
        <BLANKLINE>
        Context: Oslo is in Norway.
        Question: Where is Oslo?
        Answer:
    """
    if example.kind == "completion":
        if shots:
            raise UserError(
                f"example {example.id!r}: {len(shots)} shots for a completion record, "
                "expected 0: set the number of shots to 0 for prompt/completion data"
            )
        if chat is None:
            return Prompt(example.question, "")
        return Prompt(chat([{"role": "user", "content": example.question}]), "")
    if chat is None:
        shown = [f"{_item(shot)}\nAnswer: {shot.answers[0]}" for shot in shots]
        return Prompt("\n\n".join([INSTRUCTION, *shown, f"{_item(example)}\nAnswer:"]), " ")
    messages = []
    for shot in shots:
        messages.append({"role": "user", "content": _item(shot)})
        messages.append({"role": "assistant", "content": shot.answers[0]})
    messages.append({"role": "user", "content": _item(example)})
    messages[0]["content"] = f"{INSTRUCTION}\n\n{messages[0]['content']}"
    return Prompt(chat(messages), "")


def _item(example: Example) -> str:
    context = f"Context: {example.context}\n" if example.context else ""
    return f"{context}Question: {example.question}"


def draw_shots(pool: Sequence[Example], example: Example, k: int, seed: int) -> tuple[Example, ...]:
    """Draw the answered items to show before an example.

    Every example gets the same first k items of one seeded order, so that a prefix can be
    shared; where one of them is the example itself, or about the same context, the next in
    the order takes part instead.

    Args:
        pool: Items to draw from: the training split.
        example: The item to be answered.
        k: Number of shots.
        seed: Decides the order.

    Returns:
        k examples.

    Raises:
        UserError: The pool has too few other items.

    Example:
        >>> pool = [Example(str(i), "qa", f"c{i}", "q", ("a",), "") for i in range(9)]
        >>> shots = draw_shots(pool, pool[3], 8, seed=0)
        >>> sorted(shot.id for shot in shots)
        ['0', '1', '2', '4', '5', '6', '7', '8']
    """
    shots: list[Example] = []
    for index in _order(len(pool), seed):
        if len(shots) == k:
            break
        if not _same_item(pool[index], example):
            shots.append(pool[index])
    if len(shots) < k:
        raise UserError(
            f"example {example.id!r}: {k} shots wanted, but only {len(shots)} of the {len(pool)} "
            "examples to draw from are about another context: ask for fewer shots"
        )
    return tuple(shots)


def _same_item(shot: Example, example: Example) -> bool:
    # Without a context the question tells items apart.
    return shot.id == example.id or (shot.context or shot.question) == (
        example.context or example.question
    )


@functools.lru_cache(maxsize=8)
def _order(size: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).permutation(size).tolist())


def chat_template(tokenizer: "PreTrainedTokenizerFast") -> ChatFn | None:
    """Return the function that writes messages in a model's own chat format.

    Args:
        tokenizer: Of the model.

    Returns:
        messages -> text that ends where the model's turn begins; None where the tokenizer has
        no chat template.
    """
    if tokenizer.chat_template is None:
        return None

    def apply(messages: list[dict[str, str]]) -> str:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text)

    return apply


def first_line(text: str) -> str:
    r"""Read an answer from what a model wrote: its first line that is not blank, stripped.

    Args:
        text: What was generated after the prompt.

    Returns:
        The answer; empty where every line is blank.

    Example:
        >>> first_line("  Norway\nQuestion: Where is Rome?")
        'Norway'

    Reference:
        Boizard et al., arXiv 2402.12030: how its evaluation reads answers.
    """
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
