"""Signals of a teacher that a server runs: fetched with patience, kept, and never asked twice."""

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from uld_jax.errors import UserError
from uld_jax.files import AnyPath, make_directory
from uld_jax.mirror import Mirror
from uld_jax.teacher.choices import Choice, Fault
from uld_jax.teacher.completions import CompletionsClient
from uld_jax.teacher.echo import ServedSignal, ServedText, signal
from uld_jax.teacher.journal import SignalJournal

JOURNAL = "served.jsonl"


@dataclasses.dataclass(frozen=True)
class FetchOptions:
    """What is made of a server's answers, and how many may be missing.

    Attributes:
        shift: What `check_server` found.
        end: Whether each answer has one more position: what follows its last token, which
            predicts the end of the text.
        max_failed_fraction: Most examples without a signal, as a part of all, before a run ends.
    """

    shift: int = 0
    end: bool = False
    max_failed_fraction: float = 0.01


def served_signals(
    client: CompletionsClient,
    texts: Sequence[ServedText],
    directory: AnyPath,
    options: FetchOptions,
    *,
    progress: Callable[[int], None] | None = None,
    failed: dict[str, str] | None = None,
) -> Iterator[ServedSignal]:
    """Fetches the signals of texts that `directory` has none of, and yields those of all.

    Every signal is in the directory's journal before the next is asked for in its place, so a run
    that was killed goes on with what is missing. A text that fails `retries` times is left out.

    Args:
        client: Of the server, checked by `check_server`.
        texts: Prompts and answers, each id once.
        directory: Where the journal lies; made where it is absent. A bucket is given what is new
            in it every few seconds, see `Mirror`.
        options: See there.
        progress: Called from other threads with the number of texts since the last call.
        failed: Is given the reason by id of each text without a signal.

    Yields:
        The signals in the order of `texts`, at a temperature of 1; the first after the last
        request has ended.

    Raises:
        UserError: The server refused a request, too many texts failed, an id is there twice, or
            the journal is of other texts, another model or another number of probabilities.
    """
    twice = [id_ for id_, n in collections.Counter(t.id for t in texts).items() if n > 1]
    if twice:
        raise UserError(f"example id {twice[0]!r} is there twice, expected each id once")
    failed = {} if failed is None else failed
    failed.clear()
    about = {"model": client.server.model, "top_k": client.server.top_k, "end": options.end}
    with contextlib.ExitStack() as stack:
        try:
            make_directory(directory)
            mirror = stack.enter_context(Mirror(directory))
            mirror.pull(JOURNAL)
            journal = SignalJournal(mirror.local / JOURNAL, about, kept=mirror.push_when_due)
        except OSError as error:
            raise UserError(f"{directory / JOURNAL}: cannot write: {error.strerror}") from error
        stack.enter_context(journal)
        missing = [text for text in texts if not journal.has(text)]
        if progress is not None:
            progress(len(texts) - len(missing))
        allowed = options.max_failed_fraction * len(texts)
        _Fetch(client, journal, options, allowed, failed, progress).run(missing)
        for text in texts:
            if text.id not in failed:
                yield journal.signal(text)


class _Fetch:
    """Requests under way at a time, which end together when one of them must end the run."""

    def __init__(
        self,
        client: CompletionsClient,
        journal: SignalJournal,
        options: FetchOptions,
        allowed: float,
        failed: dict[str, str],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._client, self._journal, self._options = client, journal, options
        self._allowed, self._failed, self._progress = allowed, failed, progress
        self._stop, self._lock = threading.Event(), threading.Lock()

    def run(self, texts: Sequence[ServedText]) -> None:
        size = self._client.server.prompts_per_request
        requests = [texts[i : i + size] for i in range(0, len(texts), size)]
        pool = ThreadPoolExecutor(self._client.server.concurrency)
        try:
            futures = [pool.submit(self._guarded, request) for request in requests]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _guarded(self, texts: Sequence[ServedText]) -> None:
        if self._stop.is_set():
            return
        try:
            self._request(texts)
        except BaseException:
            self._stop.set()  # before this thread takes the next request
            raise

    def _request(self, texts: Sequence[ServedText]) -> None:
        server = self._client.server

        def read(index: int, choice: Choice) -> ServedSignal:
            found = signal(
                choice,
                texts[index],
                top_k=server.top_k,
                shift=self._options.shift,
                end=self._options.end,
            )
            self._journal.add(texts[index], found)
            return found

        results = self._client.ask(
            [text.sent for text in texts],
            read,
            echo=True,
            max_tokens=server.max_tokens,
            stop=self._stop,
        )
        if self._stop.is_set():
            return  # what is left was not asked often enough to have failed
        for text, result in zip(texts, results, strict=True):
            if isinstance(result, Fault):
                self._fail(text, result.reason)
        if self._progress is not None:
            self._progress(len(texts))

    def _fail(self, text: ServedText, reason: str) -> None:
        self._journal.add(text, reason)
        with self._lock:
            self._failed[text.id] = reason
            count = len(self._failed)
        if count > self._allowed:
            raise UserError(
                f"{self._client.address}: no signal for {count} examples, expected at most "
                f"{self._allowed:g} (max_failed_fraction "
                f"{self._options.max_failed_fraction:g}), the last {text.id!r}: {reason}: what "
                "there is was kept: mend the server and run this again"
            )
