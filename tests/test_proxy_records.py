"""What a proxy has on disk: one that is killed loses no answer that a client had, and goes on when it starts again."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import script_environ
from wire import VLLMWire

from hermes_atropos.cli import main
from hermes_atropos.errors import RecordError
from hermes_atropos.proxy import Proxy
from hermes_atropos.proxy.session import Session
from hermes_atropos.proxy.sessions import Sessions
from hermes_atropos.proxy.wire import read_request
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.trajectory import read_record
from hermes_atropos.trajectory.records import record_line

USER = {"role": "user", "content": "And now?"}


@contextmanager
def serving(wire: VLLMWire, folder: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """``hermes-atropos proxy`` in a process of its own, on a Unix socket, and a client of it."""
    chatml_tokenizer().save_pretrained(folder / "tokenizer")
    socket = folder / "proxy.sock"
    code = "import sys; from hermes_atropos.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "proxy", "--server", wire.url, "--socket", str(socket)]
    command += ["--tokenizer", str(folder / "tokenizer"), "--records", str(folder / "records")]
    with subprocess.Popen(command, env=script_environ(folder), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "returns token ids" in process.stdout.readline()
        transport = httpx.HTTPTransport(uds=str(socket), retries=50)
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=30) as client:
            try:
                yield process, client
            finally:
                process.kill()


def ask(client: httpx.Client, session: dict[str, Any], messages: list[Any]) -> Any:
    headers = {"Authorization": f"Bearer {session['api_key']}"}
    answer = client.post(f"/{session['id']}/v1/chat/completions", json={"messages": messages}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]


def test_a_killed_proxy_goes_on_where_it_was(tmp_path: Path) -> None:
    messages: list[Any] = [USER]
    with VLLMWire() as wire:
        with serving(wire, tmp_path) as (process, client):
            session = client.post("/sessions").json()
            for _ in range(2):
                messages += [ask(client, session, messages), USER]
            process.send_signal(signal.SIGKILL)
            process.wait()
        [journal] = (tmp_path / "records").iterdir()
        assert journal.stat().st_mode & 0o077 == 0, "the key in it is nobody else's"
        with journal.open("ab") as file:
            file.write(b'{"turn":2,"prompt":null,')  # what a process that is killed as it writes leaves
        with serving(wire, tmp_path) as (process, client):
            messages += [ask(client, session, messages), USER]
            headers = {"Authorization": f"Bearer {session['api_key']}"}
            client.delete(f"/{session['id']}", headers=headers).raise_for_status()
        # The probe of each start asks for one token.
        requests = [request for request in wire.requests if request.sampled and len(request.sampled[0][0]) > 1]
    record = read_record(tmp_path / "records" / f"{session['id']}.jsonl")
    [sequence] = record.sequences
    sampled = [token for request in requests for token in request.sampled[0][0]]
    assert [token for token in sequence.masked_tokens if token >= 0] == sampled
    assert [value for value in sequence.logprobs if value <= 0] == [
        value for request in requests for value in request.sampled[0][1]
    ]
    assert [message["role"] for message in record.messages] == ["user", "assistant"] * 3
    assert not journal.exists()


async def test_all_that_a_session_knows_comes_back(tmp_path: Path) -> None:
    thinks = f"<think>Hm.</think>{tool_call('look', at=1)}"
    server = ScriptedServer([thinks, thinks, "One.", Reply("Two", finish_reason="length"), "Left.", "Anew."])
    sessions = Sessions(server, records=tmp_path)
    session = sessions.open(limits={"max_requests": 9})
    ask = {"messages": [USER], "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}]}
    said, _ = await session.answer(read_request(ask | {"n": 2}))
    call = said[1].message
    result = {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "seen"}
    await session.answer(read_request(ask | {"messages": [USER, call, result], "top_p": 0.5}))
    await session.answer(read_request(ask | {"messages": [USER, call, result, USER]}))
    session.undelivered((await session.answer(read_request({"messages": [USER]})))[0])
    again = Sessions(server, records=tmp_path)
    again.restore()
    [other] = again
    for _ in range(2):
        before, after = comparable(session), comparable(other)
        assert before == after
        assert before["fidelity"]["tokens_discarded"] > 0
        for one in (session, other):
            server.replies = ["Anew."] * 9
            await one.answer(read_request(ask | {"messages": [USER, call, result, USER, USER]}))


def comparable(session: Session) -> Any:
    """What a session left, without its references."""
    record = json.loads(record_line(session.trajectory()))["rollout"]
    record["metadata"] = {}
    return json.loads(re.sub(r'"[0-9a-f]{12}\.(\d+)"', r'"\1"', json.dumps(record)))


def test_a_file_that_is_no_journal_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.journal").write_text(json.dumps({"something": "else"}) + "\n")
    with pytest.raises(RecordError, match=r"x\.journal is not the journal"):
        Proxy(ScriptedServer([]), records=tmp_path)


def test_a_server_without_token_ids_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["proxy", "--server", "http://127.0.0.1:9"]) == 2
    assert "start the server" in capsys.readouterr().err
