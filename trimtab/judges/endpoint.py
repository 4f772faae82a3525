"""A language model behind an address: the chat completions of OpenAI's interface, which vLLM, llama.cpp, ... serve too.

Requests run side by side, are made again with growing waits when the server stumbles, and never end the others: what
failed says why, what was finished is on disk.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from trimtab.judges.replies import keep_reply, read_reply, reply_path
from trimtab.progress import progress_bar
from trimtab.untrusted import parse_json

KEY_VARIABLE = "TRIMTAB_API_KEY"
LARGEST_REPLY = 16 * 2**20
LONGEST_WAIT = 60.0
FAILURES_IN_A_ROW = 8
"""After so many requests that failed one after the other, each tried several times, the rest is not asked."""

TRANSIENT = {408, 409, 425, 429}
"""Refusals that a later try may not meet; so may everything from 500 on."""
MISTAKEN = {301, 302, 303, 307, 308, 401, 403, 404, 405}
"""Refusals that every other request would meet too: the address, the model's name or the key is wrong."""

Conversation = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Reply:
    """What came back of one request: the text, or in its place what went wrong."""

    text: str | None
    problem: str = ""
    kept: bool = False
    """Whether it was on disk already."""


class Unanswered(Exception):
    """One try without a usable reply; `again` says whether another may do better, `wait` what the server asked for."""

    def __init__(self, problem: str, *, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(problem)
        self.again = again
        self.wait = wait


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers, and how patiently it is asked.

    `url` ends with `/chat/completions`. `timeout` is the most seconds of one try, from its beginning to its last byte.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout: float = 120.0
    tries: int = 5
    first_wait: float = 1.0
    """Seconds before the second try; doubled for each further one."""
    workers: int = 8
    """Requests at the same time."""

    def replies(self, conversations: Sequence[Conversation]) -> list[Reply]:
        """The reply to each conversation: from disk, from the model, or why there is none.

        The same conversation twice is one request. ValueError where the server says that address, model or key are
        wrong.
        """
        bodies = [self.body(conversation) for conversation in conversations]
        paths = [reply_path(self.url, body) for body in bodies]
        waiting = dict(zip(paths, bodies, strict=True))
        found = {path: Reply(kept, kept=True) for path in waiting if (kept := read_reply(path)) is not None}
        found |= self.ask({path: body for path, body in waiting.items() if path not in found})
        return [found[path] for path in paths]

    def body(self, conversation: Conversation) -> dict[str, Any]:
        """What is sent: the most likely reply is asked for, so that the same question has the same answer."""
        return {"model": self.model, "messages": [dict(message) for message in conversation], "temperature": 0}

    def ask(self, waiting: Mapping[Path, Mapping[str, Any]]) -> dict[Path, Reply]:
        """Ask the model for all that is missing; each reply is kept as soon as it is there."""
        if not waiting:
            return {}
        patience = Patience()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        with (
            httpx2.Client(headers=headers, timeout=self.timeout) as client,
            progress_bar(f"asking {self.model}", len(waiting)) as advance,
            ThreadPoolExecutor(self.workers) as pool,
        ):
            futures = {pool.submit(self.one, client, body, path, patience): path for path, body in waiting.items()}
            found = {}
            try:
                for future, path in futures.items():
                    found[path] = future.result()
                    advance()
            finally:
                # Where one was refused or somebody pressed Ctrl-C, the others neither begin nor try again.
                patience.over.set()
                pool.shutdown(wait=True, cancel_futures=True)
        return found

    def one(self, client: httpx2.Client, body: Mapping[str, Any], path: Path, patience: Patience) -> Reply:
        """One reply, kept on disk, or why there is none."""
        if patience.over.is_set():
            return Reply(None, "not asked")
        reply = self.tried(client, body, patience)
        if reply.text is not None:
            keep_reply(path, reply.text, self.model)
        patience.note(failed=reply.text is None)
        return reply

    def tried(self, client: httpx2.Client, body: Mapping[str, Any], patience: Patience) -> Reply:
        """Several tries, with growing waits between them."""
        problem = "never tried"
        for tries_left in reversed(range(self.tries)):
            try:
                return Reply(self.without_key(text_of(self.fetched(client, body))))
            except Unanswered as error:
                problem, again, wait = self.without_key(str(error)), error.again, error.wait
            if not again or not tries_left or patience.over.is_set():
                break
            grown = self.first_wait * 2 ** (self.tries - 1 - tries_left) * random.uniform(0.5, 1)
            patience.pause(min(LONGEST_WAIT, max(wait, grown)))
        return Reply(None, problem)

    def fetched(self, client: httpx2.Client, body: Mapping[str, Any]) -> bytes:
        """The body of one response. `Unanswered` for what failed, ValueError for what would fail every time."""
        until = time.monotonic() + self.timeout
        content = bytearray()
        try:
            with client.stream("POST", self.url, json=body) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if time.monotonic() > until:
                        raise Unanswered(f"no whole reply within {self.timeout:g} s")
                    if len(content) > LARGEST_REPLY:
                        raise Unanswered(f"a reply of more than {LARGEST_REPLY >> 20} MiB", again=False)
        except httpx2.TimeoutException:
            raise Unanswered(f"no reply within {self.timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise Unanswered(f"{type(error).__name__}: {error}") from None
        if response.status_code != 200:
            self.refuse(response, bytes(content))
        return bytes(content)

    def refuse(self, response: httpx2.Response, content: bytes) -> None:
        """Raise what a status other than 200 means."""
        status = response.status_code
        said = " ".join(content[:300].decode("utf-8", errors="replace").split())
        problem = f"{status} {response.reason_phrase}" + (f": {said}" if said else "")
        if status in MISTAKEN:
            known = f"The key in {KEY_VARIABLE} was sent." if self.key else f"A key, if it needs one: {KEY_VARIABLE}."
            raise ValueError(self.without_key(f"{self.url}, asked for {self.model}, answered {problem}. {known}"))
        wait = response.headers.get("Retry-After", "")
        raise Unanswered(
            problem, again=status in TRANSIENT or status >= 500, wait=float(wait) if wait.isdigit() else 0.0
        )

    def without_key(self, text: str) -> str:
        """Text that a server wrote, which may repeat what was sent to it, without the key."""
        return text.replace(self.key, "***") if self.key else text


class Patience:
    """Whether asking on makes sense, shared by the threads that ask: `over` is set when it does not."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.in_a_row = 0
        self.lock = threading.Lock()

    def pause(self, seconds: float) -> None:
        """Wait, though not beyond the end."""
        self.over.wait(seconds)

    def note(self, *, failed: bool) -> None:
        """Count a request that failed; one that did not ends the row."""
        with self.lock:
            self.in_a_row = self.in_a_row + 1 if failed else 0
            if self.in_a_row >= FAILURES_IN_A_ROW:
                self.over.set()


def text_of(content: bytes) -> str:
    """The text of a chat completion; "" for one without text. `Unanswered` for what is none."""
    try:
        said = parse_json(content.decode("utf-8"))["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        begun = content[:80].decode("utf-8", errors="replace")
        raise Unanswered(f"found {begun!r}, expected a chat completion") from None
    if said is not None and not isinstance(said, str):
        raise Unanswered(f"found {type(said).__name__} as the message, expected text")
    return said or ""


def endpoint_at(url: str, model: str) -> Endpoint:
    """The endpoint of an address such as http://127.0.0.1:8000/v1, with the key that the environment has.

    ValueError for an address that is none, or that holds a key: it would be written down with the results.
    """
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"{url!r} is no address ({error}); expected one such as http://127.0.0.1:8000/v1") from None
    if parsed.userinfo or parsed.query:
        raise ValueError(f"the address of {parsed.host} must hold no key, nor a question mark: set {KEY_VARIABLE}")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"{url!r} is no address; expected one such as http://127.0.0.1:8000/v1")
    ended = url.rstrip("/")
    ended = ended if ended.endswith("/chat/completions") else f"{ended}/chat/completions"
    return Endpoint(ended, model, key_of_environment())


def key_of_environment() -> str:
    """The key, which is never written anywhere. ValueError for one that cannot be sent."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(f"{KEY_VARIABLE} holds characters that a key cannot have")
    return key
