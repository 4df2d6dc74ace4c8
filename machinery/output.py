"""Lines for people: no run ends because one of them cannot be shown."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO


class Lasting:
    """A stream that text can always be written to, whatever became of its other end.

    Letters that its encoding lacks are written as escapes. When nobody reads it any more (a pipe
    whose reader has ended, a full disk, a terminal that is gone), the rest goes nowhere.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream = stream
        self.name = name
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.lose(error)

    def lose(self, error: Exception) -> None:
        """From here on, let what is written to this stream go nowhere: also what still waits."""
        reason = getattr(error, "strerror", None) or str(error)
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        if self.stream.closed:
            self.stream = io.StringIO()
        if self.name == "stdout":
            note = f"note: stdout is lost ({reason}); the run goes on without it"
            print(note, file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within this block, writing to stdout and stderr never fails, even where they are closed."""
    before = sys.stdout, sys.stderr
    names = ("stdout", "stderr")
    for name, stream in zip(names, before, strict=True):
        if stream is None:  # closed before the program began; it keeps its number from files
            stream = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process
        setattr(sys, name, Lasting(stream, name))
    try:
        yield
    finally:
        sys.stdout.flush()  # Python would do it at its end, where no one could help it
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def width(text: str) -> int:
    """How many columns of a terminal a text takes: two for 蜜, none for an accent alone."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) + wide - sum(unicodedata.combining(letter) > 0 for letter in text)


def shown(name: str, most: int = 24) -> str:
    """A name as tables and figures can take it: one line, no letters that none can write, short.

    What is in the middle of a longer one is left out, as names often differ at their ends.
    """
    line = " ".join(name.encode("utf-8", "replace").decode().split())
    text = "".join(letter if letter.isprintable() else "?" for letter in line)
    if len(text) <= most:
        return text or "?"
    tail = most // 3
    return f"{text[: most - tail - 1]}…{text[-tail:]}"
