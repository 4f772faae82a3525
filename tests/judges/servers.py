"""A stand-in for a language model's endpoint, on 127.0.0.1: it answers as it is told to, and remembers what it got."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, bytes]
"""A status and a body."""


def completion(text: Any) -> Answer:
    """A well-formed chat completion."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@dataclass
class Server:
    """A running stand-in: where it is, the questions it was asked and the headers that came with them."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


@contextmanager
def serving(answer: Callable[[str, int], Answer | None], further: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that answers with `answer(question, number of this request)`; None says nothing until it is closed."""
    server, closing, lock = Server(), threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.asked.append(body["messages"][0]["content"])
                server.headers.append(dict(self.headers))
                number = len(server.asked)
            answered = answer(server.asked[number - 1], number)
            if answered is None:
                closing.wait()
                return
            status, content = answered
            self.send_response(status)
            for name, value in (further or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        try:
            yield server
        finally:
            closing.set()
            http.shutdown()
            thread.join()


def shown(question: str) -> tuple[str, str]:
    """The two answers in a question, as they stand there."""
    found = re.search(r"<answer_A>\n(.*)\n</answer_A>\n\n<answer_B>\n(.*)\n</answer_B>", question, re.DOTALL)
    assert found, question
    return found[1], found[2]
