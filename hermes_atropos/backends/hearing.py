"""What an answer says while it is sampled, as far as it is certain: the text of a call is never taken for content."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from hermes_atropos.listening import Delta
from hermes_atropos.messages import Tool
from hermes_atropos.toolcalls import ParsedText, ToolCall
from hermes_atropos.toolcalls.schema import functions_of

__all__ = ["Hearing", "TokenHearing"]

#: Where the text of a call may begin: with a tag, or at a line's start with a list, an object or one of these words.
#: What follows waits until it is certain, for so many characters at most: by then the formats know their calls.
WORDS = ("Action", "function call")
BEGUN = "|".join(f"{word[:end]}\\Z" for word in WORDS for end in range(1, len(word)))
OPENINGS = re.compile(
    rf"[<＜](?![\s=\d])|\[(?:[A-Z]|\Z)|\](?:<\]|<?\Z)|^[ \t]*(?:[\[{{]|{'|'.join(WORDS)}|{BEGUN})", re.MULTILINE
)
PATIENCE = 128

#: Half of a character: its other bytes are in the next token.
BROKEN = "\ufffd"


class Hearing:
    """Tells a listener of one answer, piece by piece.

    Args:
        tell: hears the pieces.
        tools: what was offered: a call is told of once the name of one stands in it.
        read: what the answer says, of as much of it as there is.
    """

    def __init__(
        self, tell: Callable[[Delta], object], tools: Sequence[Tool] | None, read: Callable[[Any], ParsedText]
    ) -> None:
        self._tell = tell
        self._read = read
        self._names = list(functions_of(tools))
        self._told = {"content": "", "reasoning": ""}
        self._calls = 0

    def so_far(self, answer: Any) -> None:
        """The answer, as much of it as there is by now."""
        said = self._read(answer)
        self._text("reasoning", certain(said.reasoning or ""))
        if not said.calls:  # what stands between calls may belong to them
            self._text("content", certain(said.content or ""))
        self._called(said.calls)

    def end(self, said: ParsedText) -> None:
        """The whole answer. Where another was begun, it stands below that."""
        texts: list[tuple[Any, str]] = [("reasoning", said.reasoning or ""), ("content", said.content or "")]
        for kind, text in texts:
            if not text.startswith(self._told[kind]):
                self._tell(Delta(kind, "\n"))
                self._told[kind] = ""
            self._text(kind, text)
        self._called(said.calls)

    def _text(self, kind: Any, text: str) -> None:
        told = self._told[kind]
        if len(text) > len(told) and text.startswith(told):
            self._tell(Delta(kind, text[len(told) :]))
            self._told[kind] = text

    def _called(self, calls: Sequence[ToolCall]) -> None:
        for call in calls[self._calls :]:
            name: str | None = call.name
            if not call.ok:  # of one that is being written, the whole block is there, and the first name is its own
                name = None if self._calls else next((name for name in self._names if name in call.raw), None)
            if name is None:
                return
            self._tell(Delta("call", name))
            self._calls += 1


class TokenHearing(Hearing):
    """Tells a listener of an answer's text, of which it is given the tokens."""

    def __init__(
        self,
        tell: Callable[[Delta], object],
        tools: Sequence[Tool] | None,
        read: Callable[[list[int]], ParsedText],
        prompt_length: int,
    ) -> None:
        super().__init__(tell, tools, read)
        self._prompt_length = prompt_length
        self._ids: list[int] = []
        self._next = 0.0

    def begin(self, prompt_ids: Sequence[int]) -> None:
        self._ids = list(prompt_ids[self._prompt_length :])

    def more(self, ids: Sequence[int]) -> None:
        self._ids += ids
        started = time.monotonic()
        if started >= self._next:
            self.so_far(self._ids)
            ended = time.monotonic()
            self._next = ended + 4 * (ended - started)  # a long answer takes a fifth of the loop's time at most


def certain(text: str) -> str:
    """The text up to where it may go on otherwise than it looks."""
    recent = max(0, len(text) - PATIENCE)
    opening = OPENINGS.search(text, recent)
    return text[: opening.start() if opening else len(text)].rstrip(BROKEN).rstrip()
