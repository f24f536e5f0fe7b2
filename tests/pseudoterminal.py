"""A program in a real pseudo-terminal, and what its screen shows."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from wcwidth import wcwidth

ROWS, COLUMNS = 24, 80

#: A control sequence (ECMA-48): parameters and what it does; the shape of the cursor (``CSI n SP q``) is one too.
CONTROL = re.compile(r"\x1b\[([<=>?\d;]*)( ?[A-Za-z])")


class Screen:
    """As much of a VT100 as a line editor uses: cursor movements, erasing, scrolling, and the report of the cursor.

    Attributes:
        scrolled: the lines that left it: at its top, or when all of it was erased.
        erased: how often that was.
    """

    def __init__(self) -> None:
        self.scrolled: list[str] = []
        self.erased = 0
        self.cells = [[" "] * COLUMNS for _ in range(ROWS)]
        self.row = self.column = 0
        self.wraps = True
        self.reply = b""
        self._rest = ""

    @property
    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.cells)

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        place = 0
        while place < len(text):
            control = CONTROL.match(text, place)
            if control:
                self._control(control[1], control[2])
                place = control.end()
            elif text[place] == "\x1b" and len(text) - place < 16:  # the rest of it is still to come
                self._rest = text[place:]
                return
            else:
                self._character(text[place])
                place += 1

    def _character(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._line_feed()
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif (width := wcwidth(character)) > 0:
            if self.column + width > COLUMNS and self.wraps:
                self.column = 0
                self._line_feed()
            self.column = min(self.column, COLUMNS - width)
            self.cells[self.row][self.column : self.column + width] = [character, *[""] * (width - 1)]
            self.column += width

    def _line_feed(self) -> None:
        if self.row < ROWS - 1:
            self.row += 1
        else:
            self.scrolled.append("".join(self.cells[0]).rstrip())
            self.cells = [*self.cells[1:], [" "] * COLUMNS]

    def _control(self, parameters: str, what: str) -> None:
        numbers = [int(number) for number in re.findall(r"\d+", parameters)]
        count = max(1, numbers[0]) if numbers else 1
        match what:
            case "A":
                self.row = max(0, self.row - count)
            case "B":
                self.row = min(ROWS - 1, self.row + count)
            case "C":
                self.column = min(COLUMNS - 1, self.column + count)
            case "D":
                self.column = max(0, min(self.column, COLUMNS - 1) - count)
            case "H":
                self.row, self.column = [max(1, number) - 1 for number in numbers] if len(numbers) == 2 else (0, 0)
            case "J" | "K":
                if numbers == [2] and what == "J":
                    self.scrolled += self.text.splitlines()
                    self.erased += 1
                start = (0, 0) if numbers == [2] else (self.row, self.column)
                end = (ROWS if what == "J" else self.row + 1, 0)
                for row, cells in enumerate(self.cells):
                    self.cells[row] = [" " if start <= (row, at) < end else cell for at, cell in enumerate(cells)]
            case "h" | "l":
                if parameters == "?7":
                    self.wraps = what == "h"
            case "n":
                self.reply += f"\x1b[{self.row + 1};{self.column + 1}R".encode()


class PseudoTerminal:
    """Runs a program with a pseudo-terminal for its input, output and controlling terminal."""

    def __init__(self, command: list[str], *, cwd: Path, env: dict[str, str]) -> None:
        self.screen = Screen()
        self._fd, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.process = subprocess.Popen(
            command,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            cwd=cwd,
            env={**env, "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    @property
    def takes_keys(self) -> bool:
        """Whether the program reads keys one by one; else the terminal takes lines, and Ctrl-C for a signal."""
        return not termios.tcgetattr(self._fd)[3] & termios.ICANON

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def wait_for(self, text: str, *, times: int = 1, seconds: float = 60) -> None:
        """Read on until the screen shows ``text`` so many times; fail after so many seconds."""
        self.wait_until(lambda: self.screen.text.count(text) >= times, f"{text!r} {times} times", seconds=seconds)

    def wait_until(self, condition: Callable[[], bool], what: str, *, seconds: float = 60) -> None:
        """Read on until a condition holds, which need not be one of the screen; fail after so many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self.process.poll() is not None
            read = self._read(min(deadline, time.monotonic() + 0.1))
            if time.monotonic() > deadline or (ended and not read and not condition()):
                raise AssertionError(f"the screen never showed {what}; it shows\n{self.screen.text}")

    def wait_for_end(self, *, seconds: float = 60) -> int:
        """Read on until the program has ended, and return its exit code."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self.process.wait(max(0.0, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        """Read what comes next; False at the program's end and at the deadline."""
        if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        try:
            output = os.read(self._fd, 65536)
        except OSError:  # Linux: nobody has the inner end open any more
            return False
        self.screen.feed(self._decode(output))
        if self.screen.reply:
            os.write(self._fd, self.screen.reply)
            self.screen.reply = b""
        return bool(output)
