"""How a question is put to a model, and how its answer is read."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from uld_jax.data.records import Example
from uld_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INSTRUCTION = "Answer each question in a few words, taken from its context where there is one."


@dataclasses.dataclass(frozen=True)
class Task:
    """How items of a kind are put: the text that comes first, and the names of the parts.

    Attributes:
        system: What is asked of the model.
        context: Name of the passage.
        question: Name of the question.
        answer: Name of the answer.
    """

    system: str
    context: str = "Context"
    question: str = "Question"
    answer: str = "Answer"


TASKS = {
    "qa": Task(INSTRUCTION),
    "qa_generative": Task(
        "Read each text and answer the question after it: as shortly as the question allows, with "
        "the text's own words where they fit.",
        context="Text",
    ),
    "qa_medical": Task(
        "Each question is answered by a medical study. Read the abstract and say in one or two "
        "sentences what the study concludes, and how sure it is.",
        context="Abstract",
    ),
    "summary_dialogue": Task(
        "Sum up each dialogue in one to three sentences, as somebody who was not part of it. Call "
        "the speakers what the dialogue calls them.",
        context="Dialogue",
        answer="Summary",
    ),
}

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
    example: Example,
    *,
    shots: Sequence[Example] = (),
    chat: ChatFn | None = None,
    task: str = "qa",
    titles: bool = False,
) -> Prompt:
    """Write the prompt of one example.

    Args:
        example: The item to be answered.
        shots: Answered items to show first, in this order, each with its first answer.
        chat: Applies a model's chat template to messages (see `chat_template`); None writes
            plain text for a base model.
        task: One of `TASKS`. Its text opens the first message of a chat, as not every template
            has a place for it; a completion or a chat is its own prompt and has none.
        titles: Whether an item's title is told.

    Returns:
        The prompt; its separator is " " for a plain question and "" otherwise.

    Raises:
        UserError: A completion or a chat is to have shots; its prompt is the whole text.

    Example:
        >>> example = Example("0", "qa", "Oslo is in Norway.", "Where is Oslo?", ("Norway",), "")
        >>> print(render(example).text)
        Answer each question in a few words, taken from its context where there is one.
        <BLANKLINE>
        Context: Oslo is in Norway.
        Question: Where is Oslo?
        Answer:
    """
    if example.kind != "qa":
        if shots:
            raise UserError(
                f"example {example.id!r}: {len(shots)} shots for a {example.kind} record, "
                "expected 0: set the number of shots to 0 for prompt/completion and chat data"
            )
        return _own_prompt(example, chat)
    words = TASKS[task]
    items = [_item(each, words, titles) for each in (*shots, example)]
    answers = [shot.answers[0] for shot in shots]
    if chat is None:
        # The item itself is last and has no answer yet.
        shown = [f"{item}{words.answer}: {a}" for item, a in zip(items, answers, strict=False)]
        return Prompt("\n\n".join([words.system, *shown, f"{items[-1]}{words.answer}:"]), " ")
    messages = []
    for item, answer in zip(items, answers, strict=False):
        messages.append({"role": "user", "content": item.removesuffix("\n")})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": items[-1].removesuffix("\n")})
    messages[0]["content"] = f"{words.system}\n\n{messages[0]['content']}"
    return Prompt(chat(messages), "")


def _own_prompt(example: Example, chat: ChatFn | None) -> Prompt:
    """Of a completion or a chat, which say themselves what is asked."""
    if example.kind == "chat":
        messages = json.loads(example.question)
        if chat is None:
            said = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
            return Prompt("\n\n".join([*said, "Assistant:"]), " ")
    elif chat is None:
        return Prompt(example.question, "")
    else:
        messages = [{"role": "user", "content": example.question}]
    return Prompt(chat(messages), "")


def _item(example: Example, words: Task, titles: bool) -> str:
    """The lines before the answer, each with its end."""
    parts = [
        # Titles of Wikipedia have underscores in SQuAD's files.
        ("Title", example.title.replace("_", " ") if titles else ""),
        (words.context, example.context),
        (words.question, example.question),
    ]
    return "".join(f"{name}: {text}\n" for name, text in parts if text)


def shot_pool(train: Sequence[Example], held_out: Sequence[Example]) -> list[Example]:
    """The items that may be shown in prompts: none that stands on a text which is evaluated on.

    A data set may ask of one paragraph in both of its splits, as QED does.

    Args:
        train: The training split.
        held_out: The evaluation split, all of it.

    Returns:
        Those of the training split whose context, or question where there is none, is not there.

    Example:
        >>> items = [Example(str(i), "qa", f"c{i}", "q", ("a",), "") for i in range(3)]
        >>> [item.id for item in shot_pool(items, [Example("x", "qa", "c1", "?", ("a",), "")])]
        ['0', '2']
    """
    texts = {_text(example) for example in held_out}
    return [example for example in train if _text(example) not in texts]


def draw_shots(pool: Sequence[Example], example: Example, k: int, seed: int) -> tuple[Example, ...]:
    """Draw the answered items to show before an example.

    Every example gets the same first k items of one seeded order, so that a prefix can be
    shared; where one of them is the example itself, or about the same context, the next in
    the order takes part instead. One without an answer, as QED has some, is never shown.

    Args:
        pool: Items to draw from: the training split, see `shot_pool`.
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
        if pool[index].answers[0].strip() and not _same_item(pool[index], example):
            shots.append(pool[index])
    if len(shots) < k:
        raise UserError(
            f"example {example.id!r}: {k} shots wanted, but only {len(shots)} of the {len(pool)} "
            "examples to draw from are answered and about another context: ask for fewer shots"
        )
    return tuple(shots)


def _same_item(shot: Example, example: Example) -> bool:
    return shot.id == example.id or _text(shot) == _text(example)


def _text(example: Example) -> str:
    # Without a context the question tells items apart.
    return example.context or example.question


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
