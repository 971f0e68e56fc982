"""What is wrong or doubtful about a pair, and what to set."""

from collections.abc import Sequence
from typing import NamedTuple

from uld_jax.preflight.samples import SampleFacts
from uld_jax.preflight.tokenizers import TokenizerFacts, VocabularyFacts

LEVELS = ("error", "warning", "note")
# Vocabularies are padded to a multiple of some power of two; more than this is another model's.
MOST_PADDING = 0.05
FEW_LEFT_OUT = 0.05
FEW_PAIRED = 0.8
FEW_SHARED = 0.02
FEW_CROSSED = 0.02
MORE_SPLIT = 0.3
# Bits a byte of fluent text are about one; of random text under most models over three.
FOREIGN = 3.0


class Finding(NamedTuple):
    """Something that a person should know.

    Attributes:
        level: error (it cannot work), warning (it works badly) or note.
        fault: A short name, for programs.
        text: What is the case.
        mend: What to set or do.
    """

    level: str
    fault: str
    text: str
    mend: str

    def line(self) -> str:
        """In one line.

        Example:
            >>> Finding("note", "bos", "only the student has a BOS", "nothing to do").line()
            'note: only the student has a BOS: nothing to do'
        """
        return f"{self.level}: {self.text}: {self.mend}"


def side_findings(name: str, facts: TokenizerFacts) -> list[Finding]:
    """Of one model and its tokenizer.

    Args:
        name: "student" or the path of the teacher's config.
        facts: Of it.

    Returns:
        What there is to say, errors first.
    """
    own = "take the tokenizer that belongs to the weights"
    found = []
    if facts.beyond:
        text = f"{facts.beyond:,} tokens of the {name}'s tokenizer are beyond its model's "
        found.append(Finding("error", "tokens_beyond", f"{text}{facts.logits:,} logits", own))
    if facts.eos_id < 0:
        text = f"the {name}'s tokenizer has no end-of-text token, so that no answer ends"
        mend = "set eos_token in its tokenizer_config.json"
        # A teacher's answers may end with their first line.
        level = "error" if name == "student" else "warning"
        found.append(Finding(level, "no_eos", text, mend))
    padding = max(0, facts.logits - facts.tokens)
    share = padding / facts.logits
    named = [*zip(facts.model_eos_ids, facts.model_eos, strict=True)]
    other_end = facts.eos_id >= 0 and bool(named) and facts.eos_id not in facts.model_eos_ids
    # Each alone occurs in sound models; both together do not.
    level = "error" if other_end and share > MOST_PADDING else "warning"
    if other_end:
        said = ", ".join(f"{number} ({text!r})" for number, text in named)
        text = (
            f"the {name}'s tokenizer ends texts with {facts.eos_id} ({facts.eos!r}), its "
            f"config.json with {said}"
        )
        found.append(Finding(level, "other_eos", text, f"{own}, or correct eos_token_id"))
    if share > MOST_PADDING:
        text = f"{share:.0%} of the {name}'s {facts.logits:,} logits have no token"
        found.append(Finding(level, "few_tokens", text, own))
    elif padding:
        text = f"{padding:,} of the {name}'s {facts.logits:,} logits are padding without a token"
        mend = "nothing to do: ULD compares whole distributions, what is padding among the rest"
        found.append(Finding("note", "padded_vocabulary", text, mend))
    return found


def pair_findings(
    student: TokenizerFacts, teacher: TokenizerFacts, both: VocabularyFacts
) -> list[Finding]:
    """Of how two tokenizers differ.

    Args:
        student: The student's facts.
        teacher: A teacher's.
        both: Of their vocabularies.

    Returns:
        Notes and warnings.
    """
    found = []
    nothing = "nothing to do: alignment goes by bytes and answers alone"
    if bool(student.bos) != bool(teacher.bos):
        who = "student" if student.bos else "teacher"
        text = f"only the {who} begins its texts with a token of its own"
        found.append(Finding("note", "bos_on_one_side", text, nothing))
    for fault, what, pair in (
        ("digits", "ten digits", (student.digits, teacher.digits)),
        ("white_space", "ten characters with runs of blanks", (student.spaces, teacher.spaces)),
    ):
        if pair[0] != pair[1]:
            text = f"{what} are {pair[0]} tokens of the student and {pair[1]} of the teacher"
            mend = "set loss.alignment=span where answers are full of them"
            found.append(Finding("note", fault, text, mend))
    if abs(student.split_characters - teacher.split_characters) > MORE_SPLIT:
        text = (
            f"characters that several tokens make: {student.split_characters:.0%} of a "
            f"multilingual text in the student, {teacher.split_characters:.0%} in the teacher"
        )
        mend = "for texts other than English set loss.alignment=span"
        found.append(Finding("note", "split_characters", text, mend))
    if both.student_share < FEW_SHARED:
        text = f"only {both.shared:,} tokens stand for the same text on both sides"
        mend = "prefer ULD to losses on matched vocabularies (KL, hybrid)"
        found.append(Finding("note", "few_shared_tokens", text, mend))
    if student.chat != teacher.chat:
        who = "student" if student.chat else "teacher"
        text = f"only the {who} has a chat template"
        mend = f"set {who}.chat=never where both should be prompted in plain text"
        found.append(Finding("note", "chat_on_one_side", text, mend))
    return found


def sample_findings(name: str, facts: SampleFacts) -> list[Finding]:
    """Of what examples have shown.

    Args:
        name: The path of the teacher's config.
        facts: Of the student and this teacher.

    Returns:
        What there is to say.
    """
    found = []
    for reason, mend in (
        ("too_long_student", "set student.max_length higher, or student.shots lower"),
        ("too_long_teacher", f"set {name}.max_length higher, or {name}.shots lower"),
        ("empty_answer", "look at these answers in the data"),
    ):
        share = facts.left_out.get(reason, 0) / facts.examples
        level = "error" if share == 1 else "warning" if share > FEW_LEFT_OUT else "note"
        if share:
            text = f"{share:.1%} of the examples are left out, {reason.replace('_', ' ')}"
            found.append(Finding(level, reason, text, mend))
    if not facts.positions:
        return found
    for who, share in (("student", facts.student_border), (name, facts.teacher_border)):
        if share > FEW_CROSSED:
            text = (
                f"in {share:.0%} of the examples a token of the {who} reaches over the border "
                "between prompt and answer"
            )
            mend = f"set {who}.chat={'never' if who == 'student' else 'always'}, or end prompts "
            found.append(Finding("warning", "border", text, mend + "with a line break"))
    if facts.positional_share < FEW_PAIRED:
        text = (
            f"the i-th answer token has a counterpart for {facts.positional_share:.0%} of the "
            f"tokens only (teacher against student: {facts.length_ratio:.2f} tokens)"
        )
        found.append(Finding("warning", "unequal_answers", text, "set loss.alignment=span"))
    return found


def likelihood_findings(name: str, bits_per_byte: float) -> list[Finding]:
    """Of how well a model expects the data's answers.

    Args:
        name: "student" or the path of the teacher's config.
        bits_per_byte: Of the answers.

    Returns:
        An error where they look like random text to it.

    Example:
        >>> likelihood_findings("teacher", 0.9)
        []
    """
    if bits_per_byte < FOREIGN:
        return []
    text = f"the answers cost the {name} {bits_per_byte:.1f} bits a byte, as random text would"
    mend = "look whether tokenizer and weights belong together, and whether the prompt suits it"
    return [Finding("error", "foreign_text", text, mend)]


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Errors before warnings before notes.

    Args:
        findings: In any order.

    Returns:
        All of them.
    """
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))
