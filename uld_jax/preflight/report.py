"""The preflight's report: Markdown, JSON, and a picture of one aligned text."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uld_jax.preflight.findings import Finding
from uld_jax.preflight.samples import AlignedText, SampleFacts
from uld_jax.preflight.tokenizers import TokenizerFacts, VocabularyFacts

_DOTS_PER_INCH = 150
# Bytes in a row of the picture, and what is drawn at most.
_PER_ROW = 48
_MOST_BYTES = 4 * _PER_ROW
_COLOURS = ("#dbe9f6", "#fde3cf")


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found of a student and one teacher.

    Attributes:
        student: Of the student's tokenizer.
        teacher: Of the teacher's.
        vocabulary: Of both.
        samples: Of examples.
        bits_per_byte: Of the answers, by "student" and the teacher's path; empty where no weights
            were loaded.
        bytes: That a device holds before the first step, by kind.
        findings: Errors first.
        drawn: The text in the picture.
    """

    student: TokenizerFacts
    teacher: TokenizerFacts
    vocabulary: VocabularyFacts
    samples: SampleFacts
    bits_per_byte: dict[str, float]
    bytes: dict[str, float]
    findings: Sequence[Finding]
    drawn: AlignedText

    @property
    def errors(self) -> list[Finding]:
        """Those that training cannot work with."""
        return [finding for finding in self.findings if finding.level == "error"]


def to_json(report: Report) -> dict[str, Any]:
    """The report as `json.dumps` takes it.

    Args:
        report: The report.

    Returns:
        Its facts by name.
    """
    return {
        "student": report.student._asdict(),
        "teacher": report.teacher._asdict(),
        "vocabulary": report.vocabulary._asdict(),
        "samples": report.samples._asdict(),
        "bits_per_byte": report.bits_per_byte,
        "bytes_per_device": report.bytes,
        "findings": [finding._asdict() for finding in report.findings],
    }


def markdown(report: Report) -> str:
    """The report for people.

    Args:
        report: The report.

    Returns:
        Markdown.
    """
    sides = (report.student, report.teacher)
    bits = [f"{value:.2f}" for value in report.bits_per_byte.values()] or ["", ""]
    samples = report.samples
    rows = [
        ("", "student", "teacher"),
        ("---", "---", "---"),
        ("model", *(facts.name for facts in sides)),
        ("tokens", *(f"{facts.tokens:,}" for facts in sides)),
        ("logits", *(f"{facts.logits:,}" for facts in sides)),
        ("begins texts with", *(facts.bos or "nothing" for facts in sides)),
        ("ends texts with", *(facts.eos or "nothing" for facts in sides)),
        ("ten digits", *(f"{facts.digits} tokens" for facts in sides)),
        ("ten characters, seven blank", *(f"{facts.spaces} tokens" for facts in sides)),
        ("characters of several tokens", *(f"{facts.split_characters:.0%}" for facts in sides)),
        ("chat template", *("yes" if facts.chat else "no" for facts in sides)),
        (
            "tokens shared",
            f"{report.vocabulary.student_share:.0%}",
            f"{report.vocabulary.teacher_share:.0%}",
        ),
        ("tokens of a row, median", f"{samples.student_tokens}", f"{samples.teacher_tokens}"),
        ("bits a byte of the answers", *bits),
    ]
    sizes = ", ".join(f"{size} {number}" for size, number in samples.group_sizes.items())
    kinds = ", ".join(f"{kind} {size / 2**20:,.0f} MiB" for kind, size in report.bytes.items())
    left_out = sum(samples.left_out.values())
    return "\n".join(
        [
            "# Preflight",
            "",
            *([f"- {finding.line()}" for finding in report.findings] or ["- nothing found"]),
            "",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            f"Of {samples.examples} examples {left_out} are left out. Teacher against student, an "
            f"answer has {samples.length_ratio:.2f} times the tokens. The i-th with the i-th pairs "
            f"{samples.positional_share:.0%} of the answer tokens; {samples.single_share:.0%} of "
            "the student's have their bytes in one token of the teacher.",
            "",
            f"Groups that cover the same bytes (student:teacher tokens): {sizes or 'none'}.",
            "",
            f"A device holds before the first step: {kinds}.",
            "",
        ]
    )


def draw(aligned: AlignedText, path: Path) -> None:
    """Draws one text in both tokenizers, groups in alternating colours, as a PNG.

    Args:
        aligned: The text.
        path: Where to write.

    Example:
        >>> import tempfile
        >>> aligned = AlignedText("ab", [(0, 1), (1, 2)], [(0, 2)], [((0, 1), (0,))])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     draw(aligned, Path(folder) / "aligned.png")
    """
    # Imported here: it looks through the system's fonts and writes a cache of them.
    from matplotlib.figure import Figure

    whole = aligned.text.encode()[:_MOST_BYTES]
    rows = max(1, -(-len(whole) // _PER_ROW))
    figure = Figure(figsize=(12, 0.4 + 1.1 * rows), layout="constrained")
    axes = figure.add_subplot()
    for side, (spans, name) in enumerate(
        ((aligned.student, "student"), (aligned.teacher, "teacher"))
    ):
        colour = {
            token: _COLOURS[number % 2]
            for number, group in enumerate(aligned.groups)
            for token in group[side]
        }
        for row in range(rows):
            axes.text(-0.5, -3 * row - side - 0.5, name, ha="right", va="center", fontsize=8)
        for token, (start, end) in enumerate(spans):
            if start < end <= len(whole):
                _draw_token(axes, whole, start, end, side, colour.get(token, "white"))
    axes.set_xlim(-6, max(24, min(_PER_ROW, len(whole))))
    axes.set_ylim(-3 * rows + 1, 0)
    axes.axis("off")
    figure.savefig(path, format="png", dpi=_DOTS_PER_INCH)


def _draw_token(axes: Any, whole: bytes, start: int, end: int, side: int, colour: str) -> None:
    """Boxes over a token's bytes, one in each row that it reaches; its text in the first."""
    text = whole[start:end].decode("utf-8", "replace").replace("\n", "⏎").replace(" ", "␣")
    while start < end:
        row, first = divmod(start, _PER_ROW)
        width = min(end - start, _PER_ROW - first)
        top = -3 * row - side
        box = {"facecolor": colour, "edgecolor": "#555555", "linewidth": 0.8}
        axes.fill([first, first + width, first + width, first], [top, top, top - 1, top - 1], **box)
        axes.text(
            first + width / 2,
            top - 0.5,
            text,
            ha="center",
            va="center",
            fontsize=8,
            parse_math=False,
        )
        start, text = start + width, ""
