"""Replies of language models on disk, so that a rerun costs nothing.

One file a reply, named by a hash of everything that was asked: the address, the model, the prompt, the settings. A file
appears complete or not at all, so a run that was cut short loses nothing that was finished. What is kept is the reply
as it came; it is read anew each time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.builtin import cache_folder
from trimtab.untrusted import parse_json

FORMAT_VERSION = 1


def replies_folder() -> Path:
    """Where replies are kept. It may be deleted at any time; what is missing is asked for again."""
    return cache_folder() / "replies"


def reply_path(url: str, body: Mapping[str, Any]) -> Path:
    """Where the reply to this request stands, or will."""
    asked = json.dumps([FORMAT_VERSION, url, body], sort_keys=True)
    name = hashlib.sha256(asked.encode()).hexdigest()
    return replies_folder() / name[:2] / f"{name}.json"


def read_reply(path: Path) -> str | None:
    """A kept reply. None if there is none, or if a broken disk left something else there: it is asked for again."""
    try:
        kept = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    reply = kept.get("reply") if isinstance(kept, dict) else None
    return reply if isinstance(reply, str) else None


def keep_reply(path: Path, reply: str, model: str) -> None:
    """Write a reply, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"model": model, "reply": reply}, file)
            file.flush()
            os.fsync(file.fileno())
        Path(aside).replace(path)
    finally:
        Path(aside).unlink(missing_ok=True)
