"""Prompts and answers as token ids, with the positions of the answer."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from uld_jax.data.offsets import normalizer_of, spans_of_tokens
from uld_jax.data.prompts import ChatFn, Prompt, chat_template, draw_shots, render
from uld_jax.data.records import Example
from uld_jax.data.vocabulary import TokenBytes
from uld_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Texts a tokenizer call: enough to use its threads, few enough to show progress.
BATCH = 512


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """A prompt and its answer in the ids of one tokenizer.

    Attributes:
        tokens: int32 [T], the whole text; for an encoder-decoder what its decoder reads: the
            start token and the answer.
        answer: int32 [n], indices into `tokens` of the answer's tokens, ascending, never 0.
        encoder: int32 [P], the prompt of an encoder-decoder; empty for a decoder.
        spans: int32 [n, 2], [start, end) bytes of the answer's text that its tokens cover, see
            `align_spans`; [0, 2] where nobody found them.
    """

    tokens: np.ndarray
    answer: np.ndarray
    encoder: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    spans: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int32))

    @property
    def prompt(self) -> np.ndarray:
        """What the model is given to answer, where there is no answer yet."""
        return self.encoder if len(self.encoder) else self.tokens

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.encoder) + len(self.tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """The same answer as the student and as each teacher reads it.

    Attributes:
        id: Of the example.
        student: In the student's tokens.
        teachers: In the teachers' tokens.
        on_policy: The student wrote the answer itself: the teacher's distributions teach it, but
            the tokens are no target of the cross-entropy.
    """

    id: str
    student: Encoded
    teachers: tuple[Encoded, ...]
    on_policy: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """How one of the models is prompted.

    Attributes:
        tokenizer: A transformers fast tokenizer.
        max_length: Most tokens of prompt and answer; longer examples are dropped, never cut.
        append_eos: Whether the end-of-text token is part of the answer.
        shots: Answered examples shown before each question.
        chat: Whether to write prompts in the tokenizer's chat template.
        start_id: The token that an encoder-decoder's decoder reads first; None for a decoder.
        task: How items are put, one of `prompts.TASKS`.
        titles: Whether prompts tell the items' titles.
    """

    tokenizer: "PreTrainedTokenizerFast"
    max_length: int
    append_eos: bool
    shots: int = 0
    chat: bool = False
    start_id: int | None = None
    task: str = "qa"
    titles: bool = False

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """What its tokens stand for."""
        return TokenBytes(self.tokenizer)


@dataclasses.dataclass(frozen=True)
class Dropped:
    """How many examples were left out; each is counted once, under the first that applies.

    Attributes:
        empty_answer: The answer is blank, or without tokens.
        too_long_student: Longer than the student's max_length.
        too_long_teacher: Longer than the max_length of a teacher.
    """

    empty_answer: int = 0
    too_long_student: int = 0
    too_long_teacher: int = 0


def encode(
    tokenizer: "PreTrainedTokenizerFast",
    prompt: Prompt,
    answer: str,
    *,
    append_eos: bool,
    chat: bool,
    start_id: int | None = None,
) -> Encoded:
    """Tokenise prompt and answer as one text and mark the answer's tokens.

    A token belongs to the answer when it ends after the prompt's text, so one that holds only
    the separator, or straddles the border, does. Tokens that the tokenizer adds by itself do
    not, nor does a first token, which nothing predicts.

    For an encoder-decoder they are two texts: the prompt, which ends with the end-of-text token,
    and the answer after the start token.

    Args:
        tokenizer: A transformers fast tokenizer.
        prompt: See `prompts.render`.
        answer: Text to follow it.
        append_eos: Whether to end with the end-of-text token, as part of the answer.
        chat: Whether the prompt is in a chat template, which writes its own special tokens.
        start_id: Of an encoder-decoder, see `Side`.

    Returns:
        The ids and the answer's positions; an empty answer has none but the end-of-text token.

    Raises:
        UserError: The tokenizer has no end-of-text token to append.
    """
    side = Side(tokenizer, 0, append_eos, chat=chat, start_id=start_id)
    return _encode_many(side, [prompt], [answer])[0]


def _encode_many(side: Side, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[Encoded]:
    if side.tokenizer.eos_token_id is None and (side.append_eos or side.start_id is not None):
        way_out = ", or append_eos=False" if side.start_id is None else ""
        raise UserError(
            f"tokenizer {side.tokenizer.name_or_path!r} has no end-of-text token, expected one: "
            f"set its eos_token{way_out}"
        )
    eos_id: Any = side.tokenizer.eos_token_id  # typed as any special token, single or list
    tail = [eos_id] if side.append_eos else []
    encoded = []
    if side.start_id is not None:
        prompt_ids = _token_ids(side, [prompt.text for prompt in prompts], special=not side.chat)
        answer_ids = _token_ids(side, answers, special=False)
        for (prompt, _), text, (answer, offsets) in zip(
            prompt_ids, answers, answer_ids, strict=True
        ):
            tokens = np.asarray([side.start_id, *answer, *tail], np.int32)
            positions = np.arange(1, len(tokens), dtype=np.int32)
            spans = _spans(side, text, answer, offsets[: len(answer)], len(tail))
            prompt_tokens = np.asarray([*prompt, eos_id], np.int32)
            encoded.append(Encoded(tokens, positions, prompt_tokens, spans))
        return encoded
    texts = [
        prompt.text + prompt.separator + answer
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    text_ids = _token_ids(side, texts, special=not side.chat)
    for prompt, text, (kept, offsets) in zip(prompts, answers, text_ids, strict=True):
        border = len(prompt.text)
        own = [i for i, (_, end) in enumerate(offsets[: len(kept)]) if end > border]
        start = border + len(prompt.separator)
        characters = [(offsets[i][0] - start, offsets[i][1] - start) for i in own]
        more = len(tail) if kept else 0
        spans = _spans(side, text, [kept[i] for i in own], characters, more)
        answer = [i for i in own if i > 0]
        positions = np.asarray(answer + [len(kept)] * more, np.int32)
        spans = spans[len(own) - len(answer) :]
        encoded.append(Encoded(np.asarray(kept + tail, np.int32), positions, spans=spans))
    return encoded


def _spans(
    side: Side, text: str, ids: list[int], characters: Sequence[tuple[int, int]], ends: int
) -> np.ndarray:
    """Bytes of the answer's tokens, and of the end-of-text tokens behind them."""
    normalize = normalizer_of(side.tokenizer)
    spans = spans_of_tokens(text, side.token_bytes(ids), characters, normalize) if ids else []
    last = len(text.encode("utf-8", "surrogatepass"))
    return np.asarray([*spans, *[(last, last)] * ends], np.int32).reshape(-1, 2)


def _token_ids(
    side: Side, texts: Sequence[str], *, special: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids and offsets of each text, without an end-of-text token that it does not itself hold."""
    encodings = side.tokenizer(
        list(texts),
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    pairs = zip(encodings["input_ids"], encodings["offset_mapping"], strict=True)
    eos_id: Any = side.tokenizer.eos_token_id
    return [(_without_added_eos(ids, offsets, eos_id), offsets) for ids, offsets in pairs]


def _without_added_eos(
    ids: list[int], offsets: list[tuple[int, int]], eos_id: int | None
) -> list[int]:
    # Some tokenizers end every text themselves; only append_eos decides that here. A token
    # that stands in the text itself has a width.
    added = len(ids) > 0 and ids[-1] == eos_id and offsets[-1][1] == 0
    return ids[:-1] if added else ids


def encode_prompt(
    tokenizer: "PreTrainedTokenizerFast", prompt: Prompt, *, chat: bool
) -> np.ndarray:
    """Tokenise a prompt for generation.

    Args:
        tokenizer: A transformers fast tokenizer.
        prompt: See `prompts.render`; its separator is left for the model to write.
        chat: Whether the prompt is in a chat template.

    Returns:
        int32 [P] token ids.
    """
    side = Side(tokenizer, 0, append_eos=False, chat=chat)
    return _encode_many(side, [Prompt(prompt.text, "")], [""])[0].prompt


def encode_prompts(
    examples: Sequence[Example], side: Side, *, pool: Sequence[Example] = (), seed: int = 0
) -> list[np.ndarray]:
    """Tokenise the prompts of many examples for generation.

    Args:
        examples: The items to be answered.
        side: How the model is prompted; its max_length is left to the caller.
        pool: Examples that shots are drawn from: the training split.
        seed: Decides which shots.

    Returns:
        int32 [P] token ids of each prompt, in the examples' order.

    Raises:
        UserError: A chat template is missing, or the pool is too small.
    """
    encoded: list[Encoded] = []
    side = dataclasses.replace(side, append_eos=False)
    for batch in _batches(examples):
        bare = [Prompt(prompt.text, "") for prompt in _prompts(side, batch, pool, seed)]
        encoded += _encode_many(side, bare, [""] * len(bare))
    return [prompt.prompt for prompt in encoded]


def encode_pairs(
    examples: Sequence[Example],
    answers: Mapping[str, str],
    *,
    student: Side,
    teachers: Sequence[Side],
    pool: Sequence[Example] = (),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Pair], Dropped]:
    """Tokenise every example and its answer for the student and its teachers.

    Args:
        examples: The items.
        answers: The answer to train on by example id: the teacher's, or a reference.
        student: How the student is prompted.
        teachers: How each teacher is prompted.
        pool: Examples that shots are drawn from: the training split.
        seed: Decides which shots.
        progress: Called after each batch with the number of examples it had.

    Returns:
        The pairs in the examples' order, and how many examples were dropped.

    Raises:
        UserError: An example has no answer, a chat template is missing, or nothing is left.
    """
    found: list[Pair | str] = []
    for batch in _batches(examples):
        texts = [_answer(answers, example) for example in batch]
        found += pairs_or_reasons(batch, texts, student, teachers, pool=pool, seed=seed)
        if progress is not None:
            progress(len(batch))
    pairs = [pair for pair in found if isinstance(pair, Pair)]
    names = [field.name for field in dataclasses.fields(Dropped)]
    dropped = Dropped(**{name: found.count(name) for name in names})
    if not pairs:
        raise UserError(
            f"none of {len(examples)} examples is left: {dropped.empty_answer} with an empty "
            f"answer, {dropped.too_long_student} over the student's max_length "
            f"{student.max_length}, {dropped.too_long_teacher} over the teacher's max_length "
            f"{', '.join(str(t.max_length) for t in teachers)}: raise max_length, use fewer shots "
            "or other answers"
        )
    return pairs, dropped


def pairs_or_reasons(
    examples: Sequence[Example],
    answers: Sequence[str],
    student: Side,
    teachers: Sequence[Side],
    *,
    pool: Sequence[Example] = (),
    seed: int = 0,
) -> list[Pair | str]:
    """Tokenise examples and their answers, and say why one cannot be trained on.

    Args:
        examples: The items.
        answers: One text an example.
        student: How the student is prompted.
        teachers: How each teacher is prompted.
        pool: Examples that shots are drawn from: the training split.
        seed: Decides which shots.

    Returns:
        For each example its pair, or the field of `Dropped` that it counts under.

    Raises:
        UserError: A chat template is missing, or the pool is too small.
    """
    sides = [
        _encode_many(side, _prompts(side, examples, pool, seed), answers)
        for side in (student, *teachers)
    ]
    return [
        _reason_to_drop(text, read, (student, *teachers)) or Pair(example.id, read[0], read[1:])
        for example, text, read in zip(examples, answers, zip(*sides, strict=True), strict=True)
    ]


def _batches(examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), BATCH):
        yield examples[start : start + BATCH]


def _answer(answers: Mapping[str, str], example: Example) -> str:
    if example.id not in answers:
        raise UserError(
            f"example {example.id!r} has no answer among the {len(answers)} given: "
            "generate answers for this very data set and split"
        )
    return answers[example.id]


def _prompts(
    side: Side, batch: Sequence[Example], pool: Sequence[Example], seed: int
) -> list[Prompt]:
    chat: ChatFn | None = None
    if side.chat:
        chat = chat_template(side.tokenizer)
        if chat is None:
            raise UserError(
                f"tokenizer {side.tokenizer.name_or_path!r} has no chat template, expected one: "
                "set chat=False for a base model"
            )
    return [
        render(
            example,
            shots=draw_shots(pool, example, side.shots, seed),
            chat=chat,
            task=side.task,
            titles=side.titles,
        )
        for example in batch
    ]


def _reason_to_drop(text: str, read: Sequence[Encoded], sides: Sequence[Side]) -> str | None:
    """Of an example as the student, the first of the sides, and the teachers read it."""
    both = [*zip(read, sides, strict=True)]
    if not text.strip() or any(len(x.answer) <= side.append_eos for x, side in both):
        return "empty_answer"
    too_long = [x.length > side.max_length for x, side in both]
    if too_long[0]:
        return "too_long_student"
    return "too_long_teacher" if any(too_long) else None
