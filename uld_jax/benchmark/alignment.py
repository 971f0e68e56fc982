"""How well and how fast the tokens of two tokenizers are aligned by the bytes that they cover."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from uld_jax.benchmark.report import Sheet
from uld_jax.benchmark.timing import quartiles
from uld_jax.data import TokenBytes, align_spans, byte_offsets, match_vocabularies
from uld_jax.data.align import Group, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["alignment_sheets", "group_faults", "measure_alignment"]


def measure_alignment(
    tokenizers: Mapping[str, "PreTrainedTokenizerFast"], texts: Sequence[str], *, repeats: int
) -> dict[str, Any]:
    """Aligns texts between every ordered pair of tokenizers, and checks each group.

    Args:
        tokenizers: By name, two or more.
        texts: To align.
        repeats: Timed rounds, after an untimed one.

    Returns:
        "texts" and "bytes": how many; "tokenizers": by name "tokens", "tokenise_us" and
        "offsets_us", processor's microseconds a token of tokenising, and of that with byte offsets;
        "pairs": of each its "student", "teacher", tokens that they "matched", "groups", how many
        are "one_to_one", tokens of the "largest", the "covered" share of all bytes, "violations"
        (see `group_faults`) and "align_us", microseconds a token of both sides.
    """
    total = sum(len(_utf8(text)) for text in texts)
    offsets: dict[str, list[list[Span]]] = {}
    each: dict[str, dict[str, Any]] = {}
    for name, tokenizer in tokenizers.items():
        read = TokenBytes(tokenizer)
        offsets[name] = [byte_offsets(tokenizer, text, read=read)[1] for text in texts]
        count = sum(map(len, offsets[name]))

        def tokenise(tokenizer: Any = tokenizer) -> None:
            for text in texts:
                tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)

        def with_offsets(tokenizer: Any = tokenizer, read: TokenBytes = read) -> None:
            for text in texts:
                byte_offsets(tokenizer, text, read=read)

        each[name] = {
            "tokens": count,
            "tokenise_us": _microseconds(tokenise, count, repeats),
            "offsets_us": _microseconds(with_offsets, count, repeats),
        }
    matched = {
        frozenset(pair): len(match_vocabularies(*(tokenizers[name] for name in pair)).student)
        for pair in itertools.combinations(tokenizers, 2)
    }
    pairs = []
    for student, teacher in itertools.permutations(tokenizers, 2):
        sides = [*zip(offsets[student], offsets[teacher], strict=True)]
        pairs.append(
            {
                "student": student,
                "teacher": teacher,
                "matched": matched[frozenset((student, teacher))],
            }
            | _of_pair(texts, sides, total, repeats)
        )
    return {"texts": len(texts), "bytes": total, "tokenizers": each, "pairs": pairs}


def _of_pair(
    texts: Sequence[str],
    sides: Sequence[tuple[list[Span], list[Span]]],
    total: int,
    repeats: int,
) -> dict[str, Any]:
    def align() -> None:
        for student, teacher in sides:
            align_spans(student, teacher)

    found = [align_spans(*both) for both in sides]
    groups = [group for of_text in found for group in of_text]
    return {
        "groups": len(groups),
        "one_to_one": sum(len(s) == len(t) == 1 for s, t in groups),
        "largest": max((max(len(s), len(t)) for s, t in groups), default=0),
        "covered": sum(
            both[0][s[-1]][1] - both[0][s[0]][0]
            for both, of_text in zip(sides, found, strict=True)
            for s, _ in of_text
        )
        / max(1, total),
        "violations": sum(
            len(group_faults(text, *both, of_text))
            for text, both, of_text in zip(texts, sides, found, strict=True)
        ),
        "align_us": _microseconds(align, sum(len(s) + len(t) for s, t in sides), repeats),
    }


def _microseconds(run: Callable[[], None], count: int, repeats: int) -> float:
    """The median of some rounds, after an untimed one, over `count`.

    Of the processor's time: nothing here waits, or uses more than one thread.
    """
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return 1e6 * quartiles(seconds[1:])[1] / max(1, count)


def group_faults(
    text: str, student: Sequence[Span], teacher: Sequence[Span], groups: Sequence[Group]
) -> list[str]:
    """What is wrong with the groups of two tokenisations of a text, without end-of-text tokens.

    Args:
        text: The text.
        student: [start, end) bytes of each token.
        teacher: The same for the teacher.
        groups: What `align_spans` makes of both.

    Returns:
        A line for each group whose tokens are not the next ones of both sides, or do not cover the
        next bytes on both; and one if tokens or bytes are left at the end.

    Example:
        >>> group_faults("ab", [(0, 2)], [(0, 1), (1, 2)], [((0,), (0, 1))])
        []
        >>> group_faults("ab", [(0, 2)], [(0, 1), (1, 2)], [((0,), (0,))])[1]
        'left at the end: 0 and 1 tokens, 0 bytes'
    """
    faults = []
    byte, next_ones = 0, [0, 0]
    for number, group in enumerate(groups):
        spans = []
        for side, (members, offsets) in enumerate(zip(group, (student, teacher), strict=True)):
            if [*members] != [
                *range(next_ones[side], next_ones[side] + len(members))
            ] or not members:
                faults.append(f"group {number} has tokens {members}, expected {next_ones[side]}, …")
            next_ones[side] += len(members)
            spans.append((offsets[members[0]][0], offsets[members[-1]][1]) if members else (0, 0))
        if spans[0] != spans[1] or spans[0][0] != byte:
            covered = " and ".join(f"[{start}, {end})" for start, end in spans)
            faults.append(f"group {number} covers bytes {covered}, expected the same from {byte}")
        byte = max(end for _, end in spans)
    left = (len(student) - next_ones[0], len(teacher) - next_ones[1], len(_utf8(text)) - byte)
    # A text of which a tokenizer keeps nothing has nothing to align.
    if any(left) and student and teacher:
        faults.append(f"left at the end: {left[0]} and {left[1]} tokens, {left[2]} bytes")
    return faults


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def alignment_sheets(cases: Sequence[Mapping[str, Any]]) -> list[Sheet]:
    """A sheet of the tokenizers and one of the pairs, for each case.

    Args:
        cases: As `measure_alignment` returns them.

    Returns:
        The sheets.
    """
    sheets = []
    for case in cases:
        rows = [
            [
                name,
                f"{own['tokens']:,}",
                f"{case['bytes'] / max(1, own['tokens']):.2f}",
                f"{own['tokenise_us']:.2f}",
                f"{own['offsets_us']:.2f}",
            ]
            for name, own in case["tokenizers"].items()
        ]
        title = f"{case['texts']:,} answers, {case['bytes']:,} bytes"
        columns = ("tokenizer", "tokens", "bytes / token", "tokenise µs / token", "with offsets")
        sheets.append(Sheet(title, columns, rows))
        rows = [
            [
                pair["student"],
                pair["teacher"],
                f"{pair['matched']:,}",
                f"{pair['groups']:,}",
                f"{pair['one_to_one'] / max(1, pair['groups']):.1%}",
                str(pair["largest"]),
                f"{pair['covered']:.2%}",
                str(pair["violations"]),
                f"{pair['align_us']:.2f}",
            ]
            for pair in case["pairs"]
        ]
        columns = ("student", "teacher", "shared tokens", "groups", "1 to 1", "largest")
        columns += ("bytes covered", "violations", "align µs / token")
        sheets.append(Sheet("aligned by bytes", columns, rows))
    return sheets
