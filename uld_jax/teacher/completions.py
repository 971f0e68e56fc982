"""A client of OpenAI-compatible /completions endpoints that survives what servers do."""

import dataclasses
import datetime
import email.utils
import json
import math
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import httpx2

from uld_jax.errors import UserError
from uld_jax.teacher.choices import Choice, Fault, Prompt, read_choices

T = TypeVar("T")
# A server that names a longer wait than this is not coming back soon.
LONGEST_RETRY_AFTER_S = 600.0


@dataclasses.dataclass(frozen=True)
class Server:
    """A served teacher: where it is and how it is asked.

    Attributes:
        url: The address that "/completions" is appended to, usually ending in /v1.
        model: The name that the server knows the model by.
        top_k: Most likely tokens asked for at each position (`logprobs`); the server sets a limit.
        api_key_env: Name of the environment variable that holds the key; empty: no key is sent.
        prompts_per_request: Prompts in one request; above 1 only where the server takes a list.
        concurrency: Requests under way at a time.
        max_tokens: Tokens to generate after the given text: 1, or 0 where the server accepts it
            (llama-cpp-python reads 0 as no limit).
        connect_timeout_s: Seconds to wait for a connection.
        read_timeout_s: Seconds to wait for a part of the answer, the computation included.
        retries: Further attempts for a prompt after the first.
        backoff_s: Seconds before the first retry; doubled each time, ± 50 % at random.
        max_backoff_s: Most seconds between retries, except where the server itself names more.
        extra: Further fields of each request, e.g. {"return_tokens_as_token_ids": True} for vLLM.
    """

    url: str
    model: str
    top_k: int = 32
    api_key_env: str = ""
    prompts_per_request: int = 1
    concurrency: int = 4
    max_tokens: int = 1
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 300.0
    retries: int = 5
    backoff_s: float = 1.0
    max_backoff_s: float = 60.0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class CompletionsClient:
    """Sends prompts and reads log-probabilities; may be used from several threads.

    Args:
        server: Where and how.

    Raises:
        UserError: The address or the key cannot be used.

    Example:
        >>> with CompletionsClient(Server("http://127.0.0.1:8000/v1", "teacher")) as client:
        ...     client.address
        'http://127.0.0.1:8000/v1/completions'
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self.address = _address(server.url)
        self._key = _key(server.api_key_env)
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(
                server.read_timeout_s, connect=server.connect_timeout_s, pool=None
            ),
            limits=httpx2.Limits(max_connections=server.concurrency),
        )

    def __enter__(self) -> "CompletionsClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def ask(
        self,
        prompts: Sequence[Prompt],
        read: Callable[[int, Choice], T],
        *,
        echo: bool,
        max_tokens: int,
        stop: threading.Event | None = None,
    ) -> list[T | Fault]:
        """Asks for the log-probabilities of prompts and tries again what fails.

        Args:
            prompts: Texts or lists of token ids, sent in one request.
            read: Makes a prompt's result of its index and choice; a `Fault` that it raises counts
                as the server's.
            echo: Whether to ask for the prompt's own tokens.
            max_tokens: Tokens to generate.
            stop: Ends the attempts early when it is set.

        Returns:
            For each prompt what `read` made, or why there is nothing.

        Raises:
            UserError: The server refused the request itself; another attempt would end alike.
        """
        results: list[T | Fault] = [Fault("not asked") for _ in prompts]
        groups, waiting = [list(range(len(prompts)))], stop or threading.Event()
        for attempt in range(self.server.retries + 1):
            if attempt:
                faults = [r for r in results if isinstance(r, Fault) and r.retry]
                waiting.wait(self._delay_s(attempt, max(fault.retry_after_s for fault in faults)))
            if waiting.is_set():
                break
            for group in groups:
                body = self._body([prompts[i] for i in group], echo=echo, max_tokens=max_tokens)
                for i, choice in zip(group, self._attempt(body, len(group)), strict=True):
                    results[i] = _result(read, i, choice)
            left = [i for i, r in enumerate(results) if isinstance(r, Fault) and r.retry]
            if not left:
                break
            alone = any(fault.shared for fault in results if isinstance(fault, Fault))
            groups = [[i] for i in left] if alone else [left]
        return results

    def _delay_s(self, attempt: int, retry_after_s: float) -> float:
        backoff = self.server.backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
        return max(min(backoff, self.server.max_backoff_s), retry_after_s)

    def _body(self, prompts: list[Prompt], *, echo: bool, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.server.model,
            # Not every server takes a list of texts, even of one.
            "prompt": prompts if len(prompts) > 1 else prompts[0],
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": self.server.top_k,
            "echo": echo,
            **self.server.extra,
        }

    def _attempt(self, body: dict[str, Any], count: int) -> Sequence[Choice | Fault]:
        try:
            # Ours to encode: with escapes, any text of Python's is valid JSON.
            response = self._http.post(self.address, content=json.dumps(body).encode())
        except httpx2.TimeoutException as error:
            fault = Fault(f"no answer in time ({type(error).__name__})")
        except httpx2.RequestError as error:
            fault = Fault(f"{type(error).__name__}: {error}")
        else:
            try:
                self._raise_for_status(response)
                return read_choices(response.content, count)
            except Fault as raised:
                fault = raised
        if fault.shared and count > 1:
            fault.retry = True  # of one alone it may not be true
        return [fault] * count

    def _raise_for_status(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        said = f"{status} {response.reason_phrase}: {self._message(response)}"
        if status in (408, 429) or status >= 500:
            wait = _retry_after_s(response.headers.get("retry-after", ""))
            raise Fault(
                said,
                retry=wait <= LONGEST_RETRY_AFTER_S,
                retry_after_s=wait,
                shared=status >= 500,
            )
        if status == 400 and ("context_length" in said or "context length" in said):
            raise Fault(said, retry=False, shared=True)
        raise UserError(f"{self.address} answered {said}{self._hint(status)}")

    def _message(self, response: httpx2.Response) -> str:
        text = response.text
        try:
            found = json.loads(text)
            inner = found.get("error", found.get("message", found.get("detail", text)))
            text = inner.get("message", inner) if isinstance(inner, dict) else inner
        except (ValueError, AttributeError):
            pass
        line = " ".join(str(text).split())
        if self._key:
            line = line.replace(self._key, "***")
        return line if len(line) <= 300 else line[:300] + " …"

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            name = self.server.api_key_env
            return (
                f": expected a valid key in the environment variable {name}"
                if name
                else ": expected a key: name the environment variable that holds it (api_key_env)"
            )
        if status == 404 or 300 <= status < 400:
            return (
                f": expected an OpenAI-compatible endpoint that serves {self.server.model!r}: "
                "check the url, which usually ends in /v1, and the model's name"
            )
        return ""


def _result(read: Callable[[int, Choice], T], index: int, choice: Choice | Fault) -> T | Fault:
    if isinstance(choice, Fault):
        return choice
    try:
        return read(index, choice)
    except Fault as fault:
        return fault


def _address(text: str) -> str:
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise UserError(f"server url: expected http://HOST:PORT/v1, got {text!r}") from error
    if url.userinfo:  # would stand in every message
        raise UserError("server url: expected none with a user or password: use api_key_env")
    if url.scheme not in ("http", "https") or not url.host:
        raise UserError(f"server url: expected http://HOST:PORT/v1, got {text!r}")
    return text.rstrip("/") + "/completions"


def _key(name: str) -> str:
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"the environment variable {name} is empty: put the server's key in it")
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"the environment variable {name} holds characters that no key has, expected "
            "printable ASCII: set it anew"
        )
    return key


def _retry_after_s(header: str) -> float:
    """Seconds of a Retry-After header: a number or a date; 0 where it is neither."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
        except ValueError:
            return 0.0
        if date.tzinfo is None:
            date = date.replace(tzinfo=datetime.UTC)
        seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0
