"""The report served while its runs go on: a small web server, for this machine unless another address is asked for.

The page asks for news every two seconds (templates/live.js); it is rendered again only when files have changed.
"""

from __future__ import annotations

import errno
import hashlib
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from plotly.offline import get_plotlyjs

from trimtab.report.live import Live, Signature, notes, read_live, signature, state
from trimtab.report.page import render
from trimtab.report.read import RunRecord

SLOWEST = 120.0
"""Seconds after which a reader who says or takes nothing is let go."""
PATIENCE = 20.0
"""After a page took a second of a processor, the next one is made so many seconds later: training needs it, too."""
THIS_MACHINE = ("localhost", "127.0.0.1")


class Watched:
    """Run directories and the newest page about them. Threads may ask at the same time; one of them renders."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = directories
        self.lock = threading.Lock()
        self.runs: list[RunRecord] = []
        self.summary: Any = {}
        self.seen: tuple[Signature, list[str]] | None = None
        self.not_before = 0.0
        self.version, self.page = "", ""
        self.newest()

    def newest(self) -> tuple[str, str]:
        """The page's version and text. Raises FileNotFoundError at the start if a directory is missing."""
        with self.lock:
            if time.monotonic() >= self.not_before:
                self._look()
            return self.version, self.page

    def _look(self) -> None:
        found, trouble = asked = self._signature()
        if asked == self.seen:
            return
        began = time.thread_time()  # of the processor: what training lacks, not what it takes away
        self.version = hashlib.sha256(repr(asked).encode("utf-8", "replace")).hexdigest()[:16]
        try:
            runs, summary = read_live(self.directories) if not trouble else (self.runs, self.summary)
            self.page = self._render(found, runs, summary, trouble)
            self.runs, self.summary = runs, summary
        except (OSError, ValueError) as error:  # told on the page, above what was read last
            self.page = self._render(found, self.runs, self.summary, [str(error)])
        self.seen = asked
        self.not_before = time.monotonic() + PATIENCE * (time.thread_time() - began)

    def _signature(self) -> tuple[Signature, list[str]]:
        """The state of the files, and what is wrong with them: a run that is begun again clears its directory."""
        try:
            return signature(self.directories), []
        except OSError as error:
            if self.seen is None:
                raise
            return (), [str(error)]

    def _render(self, found: Signature, runs: Sequence[RunRecord], summary: Any, trouble: Sequence[str]) -> str:
        changed = max((time_ns // 1_000_000 for _, time_ns, _ in found), default=None)
        return render(
            runs, summary, Live(self.version, state(runs, self.directories), changed, [*trouble, *notes(runs)])
        )


class Answers(BaseHTTPRequestHandler):
    """The page at /; at /?since=VERSION the newest one without plotly.js, or nothing if it is that one."""

    timeout = SLOWEST

    def __init__(self, watched: Watched, names: Sequence[str], *rest: Any) -> None:
        self.watched, self.names = watched, names
        super().__init__(*rest)

    def handle(self) -> None:
        """One request of a reader, who may leave in the middle of it."""
        with suppress(ConnectionError):
            super().handle()

    def do_GET(self) -> None:
        """Answer one request."""
        asked, host = split(self.path), split("//" + self.headers.get("Host", ""))
        if self.names and (host is None or host.hostname not in self.names):
            # A page from elsewhere whose name was made to point here must not read runs.
            self.answer(HTTPStatus.FORBIDDEN, "trimtab watch does not go by that name.", "text/plain")
        elif asked is None:
            self.answer(HTTPStatus.BAD_REQUEST)
        elif asked.path != "/":
            self.answer(HTTPStatus.NO_CONTENT if asked.path == "/favicon.ico" else HTTPStatus.NOT_FOUND)
        else:
            self.answer_page(parse_qs(asked.query).get("since", [""])[0])

    def answer_page(self, since: str) -> None:
        """The newest page, if it is another one."""
        version, page = self.watched.newest()
        if since == version:
            self.answer(HTTPStatus.NO_CONTENT)
        else:
            self.answer(HTTPStatus.OK, page.replace(get_plotlyjs(), "", 1) if since else page)

    def answer(self, status: HTTPStatus, text: str = "", kind: str = "text/html") -> None:
        """Send a text; the reader may have left meanwhile."""
        content = text.encode("utf-8", "replace")
        with suppress(ConnectionError, TimeoutError):
            self.send_response(status)
            if status != HTTPStatus.NO_CONTENT:
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
            self.send_header("Referrer-Policy", "no-referrer")
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *words: Any) -> None:
        """Nothing: a line for every question would hide what training says."""


def split(address: str) -> SplitResult | None:
    """An address in its parts; None for what is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return None


def open_server(directories: Sequence[Path], host: str, port: int) -> ThreadingHTTPServer:
    """A server that is ready to serve the page of these run directories. Port 0 takes a free one.

    Raises FileNotFoundError for a directory that is not there, OSError for an address that cannot be listened on.
    """
    watched = Watched(directories)
    names = () if host not in THIS_MACHINE else THIS_MACHINE
    try:
        return ThreadingHTTPServer((host, port), partial(Answers, watched, names))
    except OSError as error:
        advice = "Give another --port, or --port 0 for any free one."
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            advice = "Give another --host: 127.0.0.1 for this machine alone, 0.0.0.0 for whoever can reach it."
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}. {advice}") from None
