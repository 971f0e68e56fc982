import copy
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from uld_jax.data import TokenBytes, tokenize
from uld_jax.data.prompts import Prompt, chat_template, render
from uld_jax.data.records import Example
from uld_jax.data.tokenize import Dropped, Side, encode, encode_pairs, encode_prompt
from uld_jax.errors import UserError

PROMPT = Prompt("Question: Where does the ferry sail from?\nAnswer:", " ")
ANSWERS = st.text("Oslob 27,é漢字😀?\n", min_size=1).filter(lambda text: text.strip())


def example(number, **more):
    fields = {
        "id": str(number),
        "kind": "qa",
        "context": f"The ferry carries {number} people.",
        "question": "How many people does it carry?",
        "answers": (f"{number} people",),
        "title": "",
    }
    return Example(**(fields | more))


def decoded_answer(tokenizer, encoded):
    return tokenizer.decode(encoded.tokens[encoded.answer], clean_up_tokenization_spaces=False)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(answer=ANSWERS)
def test_answer_tokens_decode_to_the_answer(tokenizer, answer):
    encoded = encode(tokenizer, PROMPT, answer, append_eos=False, chat=False)
    assert decoded_answer(tokenizer, encoded).strip() == answer.strip()
    assert encoded.answer.dtype == encoded.tokens.dtype == np.int32
    np.testing.assert_array_equal(encoded.answer, range(encoded.answer[0], len(encoded.tokens)))


@pytest.mark.parametrize("answer", ["Oslo", "2,700", "7", "漢字", "😀 é", "é", "Zoë\nAnswer:"])
def test_the_text_is_tokenised_once(byte_tokenizer, piece_tokenizer, answer):
    for tokenizer in (byte_tokenizer, piece_tokenizer):
        encoded = encode(tokenizer, PROMPT, answer, append_eos=False, chat=False)
        whole = tokenizer(f"{PROMPT.text} {answer}")["input_ids"]
        np.testing.assert_array_equal(encoded.tokens, whole)
        prompt = encode_prompt(tokenizer, PROMPT, chat=False)
        np.testing.assert_array_equal(encoded.tokens[: encoded.answer[0]], prompt)


def test_a_token_of_the_separator_alone_is_answer(byte_tokenizer, piece_tokenizer):
    for tokenizer, mark in ((byte_tokenizer, "Ġ"), (piece_tokenizer, "▁")):
        encoded = encode(tokenizer, PROMPT, "漢", append_eos=False, chat=False)
        tokens = tokenizer.convert_ids_to_tokens(encoded.tokens[encoded.answer].tolist())
        assert tokens[0] == mark
        assert len(tokens) == 4  # and the three bytes of the character


def test_a_token_over_the_border_is_answer(byte_tokenizer):
    whole = encode(byte_tokenizer, Prompt("the fer", ""), "ry", append_eos=False, chat=False)
    assert "ferry" in decoded_answer(byte_tokenizer, whole)


def test_eos_is_one_answer_token_more(tokenizer):
    without = encode(tokenizer, PROMPT, "Oslo", append_eos=False, chat=False)
    with_eos = encode(tokenizer, PROMPT, "Oslo", append_eos=True, chat=False)
    np.testing.assert_array_equal(with_eos.tokens[:-1], without.tokens)
    assert with_eos.tokens[-1] == tokenizer.eos_token_id
    np.testing.assert_array_equal(with_eos.answer[:-1], without.answer)
    assert with_eos.answer[-1] == len(without.tokens)


def test_an_eos_of_the_tokenizer_is_left_out(eos_tokenizer):
    assert eos_tokenizer("Oslo")["input_ids"][-1] == eos_tokenizer.eos_token_id
    prompt = encode_prompt(eos_tokenizer, PROMPT, chat=False)
    assert eos_tokenizer.eos_token_id not in prompt


def test_an_end_token_of_the_text_is_kept(byte_tokenizer):
    prompt = encode_prompt(byte_tokenizer, Prompt("Oslo<|end|>", ""), chat=True)
    assert prompt[-1] == byte_tokenizer.eos_token_id


def test_bos_is_kept_and_no_answer(piece_tokenizer):
    encoded = encode(piece_tokenizer, Prompt("", ""), "Oslo", append_eos=False, chat=False)
    assert encoded.tokens[0] == piece_tokenizer.bos_token_id
    assert encoded.answer[0] == 1


def test_a_first_token_is_never_answer(byte_tokenizer):
    encoded = encode(byte_tokenizer, Prompt("", ""), "Oslo sails", append_eos=False, chat=False)
    assert encoded.answer[0] == 1
    assert len(encoded.answer) == len(encoded.tokens) - 1


def test_empty_answer(tokenizer):
    prompt = Prompt("Answer:", "")
    assert len(encode(tokenizer, prompt, "", append_eos=False, chat=False).answer) == 0
    with_eos = encode(tokenizer, prompt, "", append_eos=True, chat=False)
    np.testing.assert_array_equal(with_eos.answer, [len(with_eos.tokens) - 1])


def test_chat_writes_its_own_special_tokens(byte_tokenizer, piece_tokenizer):
    piece = piece_tokenizer
    prompt = Prompt("<s>Where from?</s>", "")
    encoded = encode(piece, prompt, "Oslo", append_eos=True, chat=True)
    assert encoded.tokens.tolist().count(piece.bos_token_id) == 1
    chat_prompt = render(example(3), chat=chat_template(byte_tokenizer))
    encoded = encode(byte_tokenizer, chat_prompt, "3 people", append_eos=True, chat=True)
    assert decoded_answer(byte_tokenizer, encoded) == "3 people<|end|>"


def test_tokenizer_without_eos(byte_tokenizer):
    bare = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token"):
        encode(bare, PROMPT, "Oslo", append_eos=True, chat=False)


def sides(student_tokenizer, teacher_tokenizer, **teacher):
    student = Side(student_tokenizer, max_length=200, append_eos=True)
    options = {"max_length": 400, "append_eos": False, "shots": 2} | teacher
    return {"student": student, "teachers": [Side(teacher_tokenizer, **options)]}


def test_pairs(byte_tokenizer, piece_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenize, "BATCH", 4)
    examples = [example(n) for n in range(10)]
    answers = {x.id: f"about {x.id}" for x in examples} | {"4": " \n"}
    steps = []
    pairs, dropped = encode_pairs(
        examples,
        answers,
        **sides(byte_tokenizer, piece_tokenizer),
        pool=[example(n) for n in range(20, 30)],
        seed=3,
        progress=steps.append,
    )
    assert [pair.id for pair in pairs] == [x.id for x in examples if x.id != "4"]
    assert dropped == Dropped(empty_answer=1)
    assert steps == [4, 4, 2]
    for pair in pairs:
        assert decoded_answer(byte_tokenizer, pair.student) == f" about {pair.id}<|end|>"
        assert decoded_answer(piece_tokenizer, pair.teachers[0]) == f"about {pair.id}"
        text = piece_tokenizer.decode(pair.teachers[0].tokens)
        assert text.count("Question:") == 3
        assert byte_tokenizer.decode(pair.student.tokens).count("Question:") == 1


def test_too_long_is_dropped_and_never_cut(byte_tokenizer, piece_tokenizer):
    examples = [example(0), example(1, context="Oslo " * 300), example(2)]
    answers = {"0": "Oslo", "1": "Oslo", "2": "Oslo " * 60}
    both = sides(byte_tokenizer, piece_tokenizer, shots=0, max_length=60)
    pairs, dropped = encode_pairs(examples, answers, **both)
    assert [pair.id for pair in pairs] == ["0"]
    assert dropped == Dropped(too_long_student=1, too_long_teacher=1)


def test_an_answer_that_nothing_predicts_is_empty(byte_tokenizer, piece_tokenizer):
    bare = {"kind": "completion", "context": "", "question": ""}
    examples = [example(0, **bare), example(1, **bare)]
    both = sides(byte_tokenizer, piece_tokenizer, shots=0)
    pairs, dropped = encode_pairs(examples, {"0": "O", "1": "O,"}, **both)
    assert [pair.id for pair in pairs] == ["1"]
    assert dropped == Dropped(empty_answer=1)


def test_nothing_left(byte_tokenizer, piece_tokenizer):
    examples = [example(n) for n in range(3)]
    answers = {"0": "", "1": "Oslo", "2": "Oslo"}
    both = sides(byte_tokenizer, piece_tokenizer, shots=0, max_length=5)
    message = (
        "none of 3 examples is left: 1 with an empty answer, 0 over the student's max_length 200, "
        "2 over the teacher's max_length 5: raise max_length"
    )
    with pytest.raises(UserError, match=message):
        encode_pairs(examples, answers, **both)


def test_an_answer_is_missing(byte_tokenizer, piece_tokenizer):
    both = sides(byte_tokenizer, piece_tokenizer, shots=0)
    with pytest.raises(UserError, match="example '1' has no answer among the 1 given"):
        encode_pairs([example(0), example(1)], {"0": "Oslo"}, **both)


def test_chat_without_a_template(byte_tokenizer, piece_tokenizer):
    both = sides(byte_tokenizer, piece_tokenizer, shots=0, chat=True)
    with pytest.raises(UserError, match="has no chat template"):
        encode_pairs([example(0)], {"0": "Oslo"}, **both)


def test_an_encoder_decoder_reads_prompt_and_answer_apart(tokenizer):
    encoded = encode(tokenizer, PROMPT, "Oslo 27", append_eos=True, chat=False, start_id=5)
    eos = tokenizer.eos_token_id
    prompt = encode_prompt(tokenizer, PROMPT, chat=False)
    # One end-of-text token behind the prompt, whether or not the tokenizer adds one by itself.
    np.testing.assert_array_equal(encoded.encoder, [*prompt, eos])
    assert (encoded.tokens[0], encoded.tokens[-1]) == (5, eos)
    np.testing.assert_array_equal(encoded.answer, range(1, len(encoded.tokens)))
    assert tokenizer.decode(encoded.tokens[1:-1]).strip() == "Oslo 27"
    assert tokenizer.bos_token_id not in encoded.tokens[1:].tolist()
    assert encoded.length == len(prompt) + 1 + len(encoded.tokens)
    without = encode(tokenizer, PROMPT, "Oslo 27", append_eos=False, chat=False, start_id=5)
    np.testing.assert_array_equal(without.tokens, encoded.tokens[:-1])


def test_prompts_of_an_encoder_decoder_are_what_its_encoder_reads(eos_tokenizer):
    examples = [example(number) for number in range(3)]
    side = Side(eos_tokenizer, 400, append_eos=True, start_id=0)
    pairs, _ = encode_pairs(
        examples,
        {e.id: e.answers[0] for e in examples},
        student=side,
        teachers=[Side(eos_tokenizer, 400, append_eos=False)],
    )
    for prompt, pair in zip(tokenize.encode_prompts(examples, side), pairs, strict=True):
        np.testing.assert_array_equal(prompt, pair.student.encoder)
        assert prompt[-1] == eos_tokenizer.eos_token_id
        assert len(pair.teachers[0].encoder) == 0


def test_max_length_counts_encoder_and_decoder_together(eos_tokenizer):
    examples, answers = [example(1)], {"1": "1 people"}
    generous = Side(eos_tokenizer, 400, append_eos=True, start_id=0)
    (pair,), _ = encode_pairs(examples, answers, student=generous, teachers=[generous])
    exact = pair.student.length
    for limit, kept in ((exact, True), (exact - 1, False)):
        side = Side(eos_tokenizer, limit, append_eos=True, start_id=0)
        if kept:
            encode_pairs(examples, answers, student=side, teachers=[generous])
        else:
            with pytest.raises(UserError, match="1 over the student's max_length"):
                encode_pairs(examples, answers, student=side, teachers=[generous])


def test_a_blank_answer_of_an_encoder_decoder_is_dropped(eos_tokenizer):
    examples, answers = [example(1), example(2)], {"1": "1 people", "2": " "}
    side = Side(eos_tokenizer, 400, append_eos=True, start_id=0)
    pairs, dropped = encode_pairs(examples, answers, student=side, teachers=[side])
    assert ([pair.id for pair in pairs], dropped) == (["1"], Dropped(empty_answer=1))


def test_an_encoder_decoder_needs_an_eos(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"expected one: set its eos_token$"):
        encode(tokenizer, PROMPT, "Oslo", append_eos=False, chat=False, start_id=0)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(answer=ANSWERS, chat=st.booleans(), separator=st.sampled_from(["", " ", "\n"]))
def test_spans_are_the_answers_own_whatever_the_prompt(tokenizer, answer, chat, separator):
    prompt = Prompt("Where does the ferry sail from?\nAnswer:", separator)
    encoded = encode(tokenizer, prompt, answer, append_eos=True, chat=chat)
    spans, total = encoded.spans.tolist(), len(answer.encode())
    assert encoded.spans.dtype == np.int32
    assert len(spans) == len(encoded.answer)
    assert spans[-1] == [total, total]
    assert spans[0][0] == 0
    assert spans[-2][1] == total
    for (start, end), (following, _) in itertools.pairwise(spans):
        assert following <= end
        assert start <= end
    # Those that do not share bytes decode to exactly theirs, but for the separator.
    tokens = tokenizer.convert_ids_to_tokens(encoded.tokens[encoded.answer].tolist())
    read = TokenBytes(tokenizer)(encoded.tokens[encoded.answer].tolist())
    for i, (start, end) in enumerate(spans[:-1]):
        own = answer.encode()[start:end]
        if start > 0 and spans[i - 1][1] <= start and spans[i + 1][0] >= end:
            assert read[i] == own, tokens
        elif start == 0 and end and read[i] is not None:
            assert read[i].endswith(own) or spans[i + 1][0] < end


def test_spans_of_an_encoder_decoder_and_of_no_answer(eos_tokenizer, byte_tokenizer):
    encoded = encode(eos_tokenizer, PROMPT, "Zoë 漢", append_eos=True, chat=False, start_id=0)
    assert len(encoded.spans) == len(encoded.answer)
    assert encoded.spans[0, 0] == 0
    assert encoded.spans[-1].tolist() == [8, 8]
    assert encoded.spans[-2].tolist() == [7, 8]
    nothing = encode(byte_tokenizer, Prompt("Answer:", ""), "", append_eos=False, chat=False)
    assert nothing.spans.shape == (0, 2)
    bare = encode(byte_tokenizer, Prompt("", ""), "Oslo sails", append_eos=False, chat=False)
    # Nothing predicts the first token, and its bytes are not the second's.
    first = len(byte_tokenizer.convert_ids_to_tokens(int(bare.tokens[0])))
    assert (bare.spans[0, 0], len(bare.spans)) == (first, len(bare.tokens) - 1)


def test_spans_of_changed_text(word_tokenizer):
    text = "Zoë  bakes Crêpes "
    encoded = encode(word_tokenizer, PROMPT, text, append_eos=False, chat=False)
    assert encoded.spans[0, 0] == 0
    assert encoded.spans[-1, 1] == len(text.encode())
    starts = encoded.spans[:, 0].tolist()
    assert {4, 11} <= set(starts)
