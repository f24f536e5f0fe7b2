"""Hermes' interactive command line in a terminal: what people type does the same on our class as on Hermes'.

The same keys are typed into Hermes as it is, which finds a chat endpoint by its configuration, and into
``hermes-atropos run -- hermes``. What the two screens say, what the models are asked and what the session databases
have is compared. docs/programs.md lists what is otherwise.

Hermes prints from several threads, so the lines of one command are compared without their order.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from pseudoterminal import PseudoTerminal
from support import script_environ
from wire import MODEL, RECORD, OpenAIWire

CTRL_C, CTRL_L, CTRL_U = "\x03", "\x0c", "\x15"

CHAT = "/v1/chat/completions"

#: docs/programs.md: answers are not streamed where nobody listens; Hermes asks for lengths that nobody named, and
#: leaves out those of calls beside a conversation.
NOT_COMPARED = {"max_tokens", "stream", "stream_options"}

# ── The model ────────────────────────────────────────────────────────────────────────────────────────────────────────

COMMANDS = {"Work.": "echo hello", "Wait.": "until [ -e go ]; do sleep 0.05; done", "Sleep.": "sleep 600"}


class Model(OpenAIWire):
    """Says what it was told, or does as it was told; says nothing at all to "Hang."."""

    def __init__(self) -> None:
        super().__init__(context_length=131_072)
        self.hung = 0

    def cards(self) -> list[dict[str, Any]]:
        [card] = super().cards()
        return [card, {**card, "id": "tests/other"}]

    async def chat(self, request: web.Request) -> web.StreamResponse:
        messages = request[RECORD].body["messages"]
        if messages[-1]["content"].endswith("Hang."):
            self.hung += 1
            await asyncio.Event().wait()
        self.message = {"role": "assistant", **answer_to(messages)}
        return await super().chat(request)


def answer_to(messages: list[dict[str, Any]]) -> dict[str, Any]:
    told = messages[-1]["content"]
    if "title" in messages[0]["content"][:60]:
        return {"content": "A talk"}
    if messages[-1]["role"] == "tool":
        return {"content": "Steered." if "Be brief." in told else "Done."}
    if "summar" in told.lower():
        return {"content": "They talked."}
    if told in COMMANDS:
        function = {"name": "terminal", "arguments": json.dumps({"command": COMMANDS[told]})}
        return {
            "content": None,
            "tool_calls": [{"id": f"call_{len(messages)}", "type": "function", "function": function}],
        }
    return {"content": f"You said {told.splitlines()[-1]!r}"}


# ── The person ───────────────────────────────────────────────────────────────────────────────────────────────────────

STATUS_BAR = re.compile(r"⚕ \S+ │")

#: What an erased screen had of the spinner, the status bar and the input line.
CHROME = re.compile(r"  💻 |  ⏳ Compress| *⚕ \S+ │|─{80}|(⚕ )?❯")


class Person:
    """Types into a running Hermes.

    Attributes:
        shown: the lines that each command printed.
        asked: what the model was asked, as (messages, further fields).
        database: the rows of the session database, by table.
    """

    def __init__(self, model: Model, folder: Path, terminal: PseudoTerminal) -> None:
        self.model = model
        self.folder = folder
        self.terminal = terminal
        self.screen = terminal.screen
        self.shown: dict[str, list[str]] = {}
        self.typed = {"And this?"}
        self._start = 0

    def lines(self) -> list[str]:
        """All that was printed above the status bar, but blank lines."""
        rows = self.screen.text.splitlines()
        printed = [*self.screen.scrolled, *rows[: self._bar(rows)]]
        return [line for line in printed if line.strip() and not CHROME.match(line)]

    def _bar(self, rows: list[str]) -> int:
        return max((row for row, text in enumerate(rows) if STATUS_BAR.search(text)), default=len(rows))

    def input_line(self) -> str:
        rows = self.screen.text.splitlines()
        return "".join(rows[self._bar(rows) + 2 :][:1]).strip()

    def types(self, line: str, key: str = "\r") -> None:
        self.until(lambda: self.terminal.takes_keys, "that it reads keys")
        self.typed.add(line)
        self.terminal.type(line + key)

    def printed(self) -> str:
        """Since the last command."""
        return "\n".join(self.lines()[self._start :])

    def sees(self, *texts: str) -> None:
        """Wait until these texts were printed, in any order."""
        self.until(lambda: all(text in self.printed() for text in texts), repr(texts))

    def sees_box(self, *texts: str) -> None:
        """The same of an answer, whose box closes behind it."""
        self.sees(*texts)
        self.until(lambda: self.lines()[-1].startswith("╰"), "the end of a box")

    def until(self, condition: Callable[[], bool], what: str) -> None:
        self.terminal.wait_until(condition, what, seconds=100)

    def is_done(self, command: str) -> None:
        """Wait for the next input, and note what the command printed.

        After an interrupt Hermes paints from two threads, and may miss the place: then Ctrl-L helps, as with people.
        """

        def is_empty() -> bool:
            return self.input_line() == "❯"

        with contextlib.suppress(AssertionError):
            self.terminal.wait_until(is_empty, "an empty input line", seconds=10)
        if not is_empty():
            self.types("", CTRL_L)
        self.until(is_empty, "an empty input line")
        self.notes(command)

    def notes(self, command: str) -> None:
        lines = self.lines()
        self.shown[command], self._start = lines[self._start :], len(lines)

    def says(self, message: str, answer: str = "") -> None:
        """Have a turn."""
        self.types(message)
        self.sees_box(f"● {message}", answer or f"You said {message!r}")
        self.is_done(message)

    def commands(self, command: str, *texts: str) -> None:
        """Type a command, and wait for the last of what it prints."""
        self.types(command)
        self.sees(f"⚙  {command}", *texts)
        self.is_done(command)

    def confirms(self, command: str) -> None:
        self.types(command)
        self.until(lambda: "Approve Once" in self.screen.text, "the choices")
        self.types("1")

    def interrupts(self, keys: str) -> None:
        """Type in mid-run, and wait until Hermes has put its screen in order again: until then it drops keys."""
        erased = self.screen.erased
        self.types("", keys)
        self.until(lambda: self.screen.erased > erased, "that the screen is erased")

    def starts(self, message: str) -> None:
        """Say something that is not answered, and wait until nothing more is printed: meanwhile Hermes drops Ctrl-C."""
        hung = self.model.hung
        self.types(message)
        self.sees(f"● {message}")
        self.until(lambda: self.printed().count("─" * 40) == 2, "two rules")
        if message in COMMANDS:
            self.sees("preparing terminal")
            command = COMMANDS[message].partition(" ]")[0]
            self.until(lambda: command in self.screen.text, command)
        else:
            self.until(lambda: self.model.hung > hung, "a call of the model")


def talk(person: Person) -> None:
    """What is compared. The second Ctrl-C comes late: within two seconds of the first, Hermes takes it for an exit."""
    person.sees("Welcome to Hermes Agent!", "tirith security scanner", "matching only")
    person.is_done("the start")
    person.says("Hello.")
    person.commands("/usage", "Compressions:")
    person.says("Work.", "Done.")
    person.starts("Sleep.")
    person.interrupts(CTRL_C)
    person.sees("Interrupting agent", "[exit 130]")
    person.is_done("Ctrl-C in a tool")
    person.starts("Wait.")
    person.types("/steer Be brief.")
    person.sees("Steer queued")
    (person.folder / "work" / "go").touch()
    person.sees_box("Steered.")
    person.is_done("/steer")
    person.starts("Hang.")
    person.interrupts("And this?\r")
    person.sees_box("● And this?", "You said 'And this?'")
    person.is_done("a message in mid-run")
    person.says("Again.")
    person.types("/retry")
    person.sees_box("⚙  /retry", "Retrying", "● Again.", "You said 'Again.'")
    person.is_done("/retry")
    person.confirms("/undo")
    person.sees("⚙  /undo", "remaining in history")
    person.until(lambda: person.input_line() == "❯ Again.", "the message again")
    person.types("", CTRL_U)
    person.is_done("/undo")
    person.types("/usage")
    person.sees("⚙  /usage", "Compressions:")
    person.is_done("/usage again")
    person.commands("/background Count.", "complete", "You said 'Count.'", f" {'─' * 78}")
    person.commands("/compress", "Approx request size", "denser summaries")
    person.says("After.")
    person.starts("Hang.")
    person.interrupts(CTRL_C)
    person.sees("Interrupting agent", "Interrupted during", "Operation interrupted", f" {'─' * 78}")
    person.is_done("Ctrl-C in a model call")
    person.types(f"/model {MODEL}")
    person.sees("session only")
    person.is_done("/model")
    person.says("Switched?")
    person.confirms("/new")
    person.sees("⚙  /new", "New session started!")
    person.is_done("/new")
    person.says("Fresh.")
    person.commands("/resume", "Recent sessions", "Example: /resume 2")
    person.types("/resume 2")
    person.sees_box("⚙  /resume 2", "Resumed session", "Previous Conversation")
    person.is_done("/resume 2")
    person.says("Back.")
    person.types("/model tests/other")
    person.sees("session only")
    person.is_done("/model of another")
    person.says("Other?")
    person.types("/exit")
    assert person.terminal.wait_for_end() == 0
    person.notes("/exit")


@contextlib.contextmanager
def hermes(model: Model, folder: Path, *command: str) -> Iterator[Person]:
    """Hermes at the model's address, without what it does at times of its own: it paints its history again, reviews its
    memory, and looks within a time for the machine's Python."""
    configuration = {
        "model": {"default": MODEL, "provider": "custom", "base_url": f"{model.url}/v1", "api_key": "none"},
        "display": {"persistent_output": False},
        "agent": {"environment_probe": False},
        "memory": {"nudge_interval": 0},
        "skills": {"creation_nudge_interval": 0},
    }
    for name in ("home", "work"):
        (folder / name).mkdir(parents=True)
    (folder / "home" / "config.yaml").write_text(json.dumps(configuration))
    environ = script_environ(
        folder, HERMES_HOME=str(folder / "home"), HERMES_DISABLE_LAZY_INSTALLS="1", COLORFGBG="15;0"
    )
    with PseudoTerminal([sys.executable, "-c", *command], cwd=folder / "work", env=environ) as terminal:
        yield Person(model, folder, terminal)


def talked_to_stock(folder: Path) -> Person:
    main = "from hermes_cli.main import main; main()"
    with Model() as model, hermes(model, folder, main) as person:
        talk(person)
    return person


def talked_to_ours(folder: Path) -> Person:
    main = "import sys; from hermes_atropos.cli import main; sys.exit(main())"
    with Model() as model:
        options = ["--server", f"{model.url}/v1", "--records", str(folder / "records.jsonl")]
        with hermes(model, folder, main, "run", *options, "--", "hermes") as person:
            talk(person)
    return person


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Person, Person]:
    """Who talked to Hermes as it is, and who talked to ours."""
    folder = tmp_path_factory.mktemp("interactive")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stock = pool.submit(talked_to_stock, folder / "them")
        ours = pool.submit(talked_to_ours, folder / "ours")
        return stock.result(), ours.result()


# ── The comparisons ──────────────────────────────────────────────────────────────────────────────────────────────────

#: What is never the same twice.
CHANCE = {
    r"\d{8}_\d{6}_[0-9a-f]{6}|bg_\d{6}_[0-9a-f]{6}": "SESSION",
    r"127\.0\.0\.1:\d+": "SERVER",
    r"(?<![\w.])((\d+h )?\d+m( \d+s)?|\d+(\.\d+)?s)\b": "TIME",
    r"just now|TIME ago": "RECENTLY",
    r"\s+": " ",
}

#: Each answer has a mark of ours in the history, and Hermes' guess of its size counts it.
ESTIMATE = re.compile(r"~[\d,]+ ")


def plain(text: str, folder: Path) -> str:
    text = text.replace(str(folder), "FOLDER")
    for pattern, word in CHANCE.items():
        text = re.sub(pattern, word, text)
    return text.strip()


def said(person: Person, command: str) -> list[str]:
    """The lines that a command printed, but for what was typed, which may be seen while it is moved."""
    typed = {"1", command, *person.typed}
    lines = [ESTIMATE.sub("~N ", plain(line, person.folder)) for line in person.shown[command]]
    return sorted(line for line in lines if line not in typed)


#: What is noted in ``talk``, but what has a test of its own.
COMPARED = [
    "Hello.",
    "/usage",
    "Work.",
    "Ctrl-C in a tool",
    "/steer",
    "a message in mid-run",
    "Again.",
    "/retry",
    "/undo",
    "/usage again",
    "/background Count.",
    "/compress",
    "After.",
    "Ctrl-C in a model call",
    "/model",
    "Other?",
    "Switched?",
    "/new",
    "Fresh.",
    "/resume",
    "/resume 2",
    "Back.",
    "/exit",
]


@pytest.mark.parametrize("command", COMPARED)
def test_the_screens_say_the_same(command: str, both: tuple[Person, Person]) -> None:
    stock, ours = both
    assert said(ours, command)
    assert said(ours, command) == said(stock, command)


def banner(person: Person) -> str:
    text = "\n".join(plain(line, person.folder) for line in person.shown["the start"])
    return re.sub(r"✦ Tip.*?(?=⚠ tirith)|\S+/work\b", "", text[text.index("╭") :], flags=re.DOTALL)


def test_the_banner_is_the_same_but_for_the_tip_of_the_day(both: tuple[Person, Person]) -> None:
    stock, ours = both
    assert "Available Tools" in banner(ours)
    assert banner(ours) == banner(stock)


def test_another_model_is_taken(both: tuple[Person, Person]) -> None:
    """And this library says that tokens are not to be had from it."""
    stock, ours = (said(person, "/model of another") for person in both)
    assert "✓ Model switched: tests/other" in stock
    assert set(stock) <= set(ours)
    for person in both:
        assert person.model.to(CHAT)[-1].body["model"] == "tests/other"


def asked(person: Person, *, of_conversations: bool) -> list[Any]:
    """What the model was asked, in order; each tool call with its arguments as they are meant."""
    bodies = []
    for request in person.model.to(CHAT):
        if ("tools" in request.body) == of_conversations:
            body = {name: request.body[name] for name in sorted(request.body.keys() - NOT_COMPARED)}
            bodies.append(json.loads(json.dumps(body), object_hook=lambda found: plainly(found, person.folder)))
    return bodies


def plainly(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    if isinstance(found.get("arguments"), str):
        found["arguments"] = json.loads(found["arguments"])
    return {name: plain(value, folder) if isinstance(value, str) else value for name, value in found.items()}


def test_the_models_are_asked_the_same(both: tuple[Person, Person]) -> None:
    """But for the arguments of earlier tool calls: here they are sent as the model wrote them, by Hermes anew."""
    stock, ours = (asked(person, of_conversations=True) for person in both)
    assert len(ours) > 10
    assert ours == stock


def test_the_models_are_asked_the_same_beside_the_conversations(both: tuple[Person, Person]) -> None:
    """Two titles, which nobody waits for, and a summary."""
    stock, ours = (sorted(map(str, asked(person, of_conversations=False))) for person in both)
    assert len(ours) == 3
    assert ours == stock


def rows(person: Person, table: str, order: str) -> list[dict[str, Any]]:
    """A table of the session database, with the sessions' ids in the order of their beginnings, without times."""
    with contextlib.closing(sqlite3.connect(person.folder / "home" / "state.db")) as database:
        database.row_factory = sqlite3.Row
        sessions = [row["id"] for row in database.execute("SELECT id FROM sessions ORDER BY started_at")]
        found = [dict(row) for row in database.execute(f"SELECT * FROM {table} ORDER BY {order}")]
    for row in found:
        for name, value in row.items():
            if value in sessions:
                row[name] = sessions.index(value)
            elif isinstance(value, str):
                row[name] = plain(value, person.folder)
    return [{name: value for name, value in row.items() if name not in TIMES} for row in found]


TIMES = {"timestamp", "started_at", "ended_at", "first_seen", "last_seen"}


def test_the_messages_in_the_databases_are_the_same(both: tuple[Person, Person]) -> None:
    stock, ours = (rows(person, "messages", "id") for person in both)
    assert ours == stock


def test_the_sessions_in_the_databases_are_the_same_but_for_the_summary(both: tuple[Person, Person]) -> None:
    """Hermes leaves out what the summary of a compression took; here the session has every answer of the server."""
    stock, ours = (rows(person, "sessions", "started_at") for person in both)
    add_an_answer(stock[0])
    assert ours == stock


def test_the_usage_in_the_databases_is_the_same_but_for_the_summary(both: tuple[Person, Person]) -> None:
    """And a title's call has no address here."""
    order = "session_id, task, billing_mode"
    stock, ours = (rows(person, "session_model_usage", order) for person in both)
    first = next(row for row in stock if row["session_id"] == 0 and not row["task"])
    add_an_answer(first)
    for row in [*stock, *ours]:
        if row["task"]:
            row["billing_provider"] = row["billing_base_url"] = ""
    assert sorted(map(str, ours)) == sorted(map(str, stock))


def add_an_answer(row: dict[str, Any]) -> None:
    row["api_call_count"] += 1
    row["input_tokens"] += 11
    row["output_tokens"] += 7
