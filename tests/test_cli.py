"""The ``hermes-atropos`` command, as it is called: what it prints, and what it says of what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import script_environ
from wire import VLLMWire, nobody

from hermes_atropos.cli import main
from hermes_atropos.react import AtroposAgent
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.trajectory import AgentResult, read_records, write_record


def look(folder: str) -> str:
    """List a folder.

    Args:
        folder: its path.
    """
    return f"notes.txt\nplan.md in {folder}"


@pytest.fixture
async def record(tmp_path: Path) -> Path:
    """A rollout of a malformed call, a call and an answer."""
    server = ScriptedServer(
        [
            '<tool_call>\n{"name": "look", "arguments": {"folder": }\n</tool_call>',
            f"<think>They want a number.</think>{tool_call('look', folder='/srv')}",
            "There are two files.",
        ]
    )
    write_record(await AtroposAgent(server, tools=[look]).run("How many files?"), tmp_path / "rollout.jsonl")
    return tmp_path / "rollout.jsonl"


@pytest.fixture
def silent(record: Path) -> Path:
    """The same record without what its tokens say, as releases before the vocabulary wrote it."""
    [result] = read_records(record)
    path = record.with_name("silent.jsonl")
    write_record(replace(result, vocabulary={}), path)
    written = json.loads(path.read_text("utf-8"))
    assert written["rollout"].pop("vocabulary") == {}
    path.write_text(json.dumps(written) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    chatml_tokenizer().save_pretrained(path)
    return str(path)


def in_order(text: str, *parts: str) -> bool:
    place = 0
    for part in parts:
        place = text.find(part, place) + 1
        if not place:
            return False
    return True


class TestView:
    def test_shows_the_conversation_in_the_terminal(self, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["view", str(record)]) == 0
        out = capsys.readouterr().out
        assert in_order(
            out,
            "completed (success)",
            "2, 2 tool calls (1 malformed, 1 failed)",
            "How many files?",
            "attempt 1 of 2",
            "[invalid_json]",
            "<think>They want a number.</think><tool_call>",
            '"folder": "/srv"',
            "plan.md in /srv",
            "There are two files.<|im_end|>",
            "Sequence 1",
        )

    def test_a_record_that_does_not_hold_what_its_tokens_say_is_shown_without_them(
        self, silent: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["view", str(silent)]) == 0
        out = capsys.readouterr().out
        assert in_order(
            out, "They want a number.", "→ look", "folder: /srv", "plan.md in /srv", "There are two files.\n"
        )
        assert "<|im_end|>" not in out

    def test_a_tokenizer_says_what_such_a_record_does_not_hold(
        self, silent: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["view", str(silent), "--tokenizer", tokenizer]) == 0
        assert "There are two files.<|im_end|>" in capsys.readouterr().out

    def test_writes_a_page(self, record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        page = tmp_path / "page.html"
        assert main(["view", str(record), "--html", str(page)]) == 0
        assert str(page) in capsys.readouterr().out
        assert "There are two files." in page.read_text("utf-8")

    def test_shows_the_record_asked_for(self, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_record(AgentResult(False, error="the second one failed"), record, append=True)
        assert main(["view", str(record), "--index", "1"]) == 0
        out = capsys.readouterr().out
        assert "the second one failed" in out
        assert "two files" not in out

    def test_a_terminal_gets_no_commands_from_a_record(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        hostile = "\x1b]0;owned\x07\x1b[2J\u202e\ud800 [bold]plain[/bold]"
        path = tmp_path / "rollout.jsonl"
        write_record(AgentResult(True, messages=[{"role": "user", "content": hostile}]), path)
        assert main(["view", str(path)]) == 0
        out = capsys.readouterr().out
        assert "\\x1b]0;owned\\x07\\x1b[2J\\u202e\\ud800 [bold]plain[/bold]" in out
        assert not {"\x1b", "\x07", "\u202e"} & set(out)


class TestWhatIsWrong:
    """One sentence on stderr, which says what to do, and exit code 2."""

    @staticmethod
    def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("hermes-atropos: ")
        assert "Traceback" not in err
        return err

    def test_a_truncated_record(self, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
        record.write_bytes(record.read_bytes()[:-100])
        assert "truncated" in (said := self.fails(capsys, "view", str(record)))
        assert "run it again" in said

    def test_a_record_of_another_version(self, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
        written = json.loads(record.read_text("utf-8")) | {"version": 99}
        record.write_text(json.dumps(written) + "\n", "utf-8")
        assert "version 99" in (said := self.fails(capsys, "view", str(record)))
        assert "read it with the release" in said

    def test_no_record(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "empty.jsonl").touch()
        assert "run it again" in self.fails(capsys, "view", str(tmp_path / "empty.jsonl"))
        assert "cannot be read" in self.fails(capsys, "view", str(tmp_path / "missing.jsonl"))

    @pytest.mark.parametrize("index", ["1", "-1"])
    def test_an_index_that_the_file_does_not_have(
        self, index: str, record: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert "pass --index 0 to 0" in self.fails(capsys, "view", str(record), "--index", index)

    def test_a_page_that_cannot_be_written(self, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
        page = record.parent / "missing" / "page.html"
        assert "cannot be written" in self.fails(capsys, "view", str(record), "--html", str(page))

    def test_a_tokenizer_that_is_not_there(self, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no tokenizer" in self.fails(capsys, "view", str(record), "--tokenizer", str(record.parent))

    def test_nobody_at_the_url(self, capsys: pytest.CaptureFixture[str]) -> None:
        with nobody() as url:
            said = self.fails(capsys, "probe", url)
        assert "start the server" in said
        assert said.count("\n") == 1

    def test_a_model_that_is_not_served(self, capsys: pytest.CaptureFixture[str]) -> None:
        with VLLMWire() as wire:
            assert "does not serve 'other'" in self.fails(capsys, "probe", wire.url, "--model", "other")

    def test_no_program_to_run(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "give one behind --" in self.fails(capsys, "run", "--")

    def test_a_program_that_is_not_there(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = self.fails(capsys, "run", "--", "no_such_program.py", "--its-own")
        assert "no_such_program.py is not a program" in said
        assert "hermes-acp" in said

    def test_a_command_that_does_not_exist(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(["stroll"])
        assert caught.value.code == 2
        assert "view" in capsys.readouterr().err


def test_a_server_that_returns_token_ids(capsys: pytest.CaptureFixture[str], tokenizer: str) -> None:
    with VLLMWire(api_key="secret") as wire:
        assert main(["probe", wire.url, "--api-key", "secret", "--tokenizer", tokenizer]) == 0
    assert "returns token ids" in capsys.readouterr().out


def test_versions_of_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["versions"]) == 0
    out = capsys.readouterr().out
    assert in_order(out, "hermes-agent", "(supported: ", "atroposlib", "(supported: ")


def test_a_reader_that_has_seen_enough_ends_it_quietly(record: Path) -> None:
    code = f"import sys; from hermes_atropos.cli import main; sys.exit(main(['view', {str(record)!r}]))"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=script_environ(record.parent),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1
