"""Where an answer ends when a certain text ends it: found in the text, whatever the tokens."""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

from uld_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Texts that end an answer.

    They are looked for in the decoded text, so they may begin and end in the middle of a token,
    span several, or need several tokens for one character. Special tokens have their names there.

    Args:
        texts: The texts, none empty.
        tokenizer: Turns ids into text.

    Raises:
        UserError: An empty text, or no tokenizer.

    Example:
        >>> from uld_jax.testing import toy_tokenizer
        >>> tokenizer = toy_tokenizer()
        >>> StopStrings(["ll s"], tokenizer).cut(tokenizer("The old mill stands").input_ids)[1]
        'The old mi'
    """

    texts: Sequence[str]
    tokenizer: Any

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            object.__setattr__(self, "texts", (self.texts,))
        if "" in self.texts:
            raise UserError(f"stop_strings must not be empty texts: got {list(self.texts)}")
        if self.texts and self.tokenizer is None:
            raise UserError("stop_strings need the tokenizer: pass tokenizer=…")

    def cut(self, ids: Sequence[int], known: int = 0) -> tuple[int, str] | None:
        """Where the first stop string ends an answer.

        Args:
            ids: The answer so far.
            known: So many of them hold none.

        Returns:
            The number of ids up to and with the one that completes the stop string, and the text
            before the stop string; None where there is none.
        """
        if not self.texts or self._first(ids) < 0:
            return None
        counts = range(known + 1, len(ids) + 1)
        # The prefix that first holds one: the answer is the same however often one looks.
        count = counts[bisect.bisect_left(counts, True, key=lambda n: self._first(ids[:n]) >= 0)]
        text = self._text(ids[:count])[: self._first(ids[:count])]
        for special in self.tokenizer.all_special_tokens:
            text = text.replace(special, "")
        return count, text

    def text(self, ids: Sequence[int]) -> str | None:
        """The answer's text without special tokens, or None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _first(self, ids: Sequence[int]) -> int:
        """Where the first stop string begins, or -1."""
        text = self._text(ids)
        return min((at for at in map(text.find, self.texts) if at >= 0), default=-1)
