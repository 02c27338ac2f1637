"""Batches in OpenAI's line format: requests in one file, answers in another. Reading, checking, and finding out what is left to do.

A request line is `{"custom_id", "method", "url", "body"}`. An answer line is `{"id", "custom_id", "response", "error"}`; answers are in the
order in which they come. Invariants: the output file consists of whole lines; a `custom_id` has at most one answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from llmos.errors import InvalidRequest

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
MAX_ID_CHARS = 512
_FIELDS = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, slots=True)
class Line:
    """One request. `number` counts from 1."""

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]


def read_requests(path: Path) -> Iterator[Line]:
    """All lines, checked; raises `InvalidRequest` that names the line. Empty lines are skipped."""
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield _read(path, number, text, seen)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}", field="input") from None


def _read(path: Path, number: int, text: bytes, seen: set[str]) -> Line:
    def wrong(what: str) -> InvalidRequest:
        return InvalidRequest(f"{path}:{number}: {what}", field="input")

    try:
        found = json.loads(text)
    except ValueError as error:
        raise wrong(f"no JSON: {error}") from None
    if not isinstance(found, dict):
        raise wrong("a request is a JSON object")
    if unknown := sorted(found.keys() - _FIELDS):
        raise wrong(f"unknown field {unknown[0]!r:.60}; there are {', '.join(sorted(_FIELDS))}")
    custom_id, url, body = found.get("custom_id"), found.get("url"), found.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise wrong(f"custom_id: a text of 1 to {MAX_ID_CHARS} characters")
    if custom_id in seen:
        raise wrong(f"custom_id {custom_id!r:.60} was there before")
    seen.add(custom_id)
    if found.get("method", "POST") != "POST":
        raise wrong("method: only POST")
    if url not in URLS:
        raise wrong(f"url: {url!r:.60} is none of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise wrong("body: a JSON object")
    if body.get("stream"):
        raise wrong("body.stream: a batch has no streams")
    return Line(number, custom_id, url, body)


class Output:
    """The file of answers, appended to. What an earlier run wrote counts; a last line that was not finished goes."""

    def __init__(self, path: Path) -> None:
        self.done: set[str] = set()
        self.failed = 0  # of these
        try:
            self._file: IO[bytes] = path.open("r+b" if path.exists() else "w+b")
        except OSError as error:
            raise InvalidRequest(f"{path}: {error.strerror}", field="output") from None
        whole = 0
        try:
            for number, text in enumerate(self._file, 1):
                if not text.endswith(b"\n"):
                    break
                self._note(path, number, text)
                whole += len(text)
        except InvalidRequest:
            self._file.close()
            raise
        self._file.seek(whole)
        self._file.truncate()

    def _note(self, path: Path, number: int, text: bytes) -> None:
        try:
            found = json.loads(text)
            self.done.add(found["custom_id"])
            self.failed += found["response"]["status_code"] != 200
        except (ValueError, KeyError, TypeError):
            problem = f"{path}:{number}: this is not an answer of a batch; name another file"
            raise InvalidRequest(problem, field="output") from None

    def write(self, line: Line, status: int, body: Any, request_id: str) -> None:
        """One answer, in the file before the next one is written."""
        answer = {
            "id": f"batch_req_{line.number}",
            "custom_id": line.custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": None,
        }
        self._file.write(json.dumps(answer, ensure_ascii=False).encode(errors="surrogatepass") + b"\n")
        self._file.flush()
        self.done.add(line.custom_id)
        self.failed += status != 200

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
