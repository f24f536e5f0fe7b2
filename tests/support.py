"""What several test modules need: agents, checks against the server's record, and what a rollout may not leave."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from tools import terminal_tool
from tools.process_registry import process_registry

from hermes_atropos.exports.atropos import MASK, PROMPT_LOGPROB
from hermes_atropos.hermes.agent import AtroposAIAgent
from hermes_atropos.hermes.versions import hermes_version
from hermes_atropos.sandbox import folder, wall
from hermes_atropos.sandbox.processes import MARKER
from hermes_atropos.testing import Reply, ScriptedRequest, ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.trajectory import AgentResult, SequenceData

#: Seconds after which something that should have happened is taken for not happening. No test waits so long to pass.
LIMIT = 30

END = chatml_tokenizer().convert_tokens_to_ids("<|im_end|>")
START = chatml_tokenizer().convert_tokens_to_ids("<|im_start|>")

QUIET: dict[str, Any] = {"quiet_mode": True, "skip_context_files": True, "skip_memory": True}


def agent_on(server: Any, **options: Any) -> AtroposAIAgent:
    """An agent with the terminal and the file tools."""
    return AtroposAIAgent(server=server, **{"enabled_toolsets": ["terminal", "file"], **QUIET, **options})


def agent_saying(*replies: str | Reply, **options: Any) -> AtroposAIAgent:
    """An agent whose model gives these answers in turn; ``server_of`` has the server."""
    return agent_on(ScriptedServer(list(replies)), **options)


def server_of(agent: AtroposAIAgent) -> ScriptedServer:
    server: ScriptedServer = agent._backend.server
    return server


def terminal(command: str, **arguments: Any) -> str:
    """A model's call of the terminal."""
    return tool_call("terminal", command=command, **arguments)


#: Since when some of what Hermes' model reads and calls is another, as the tests that use it say.
SINCE_0_21 = (hermes_version() or Version("99")) >= Version("0.21")

RENAMED = {"todo": "todo_list", "process": "process_manage", "cronjob": "cronjob_manage"}


def hermes_name(tool: str) -> str:
    """A tool's name in the installed release: some have another from 0.21 on."""
    return RENAMED.get(tool, tool) if SINCE_0_21 else tool


def hermes_call(tool: str, **arguments: Any) -> str:
    """A model's call of one of Hermes' tools by its name in 0.19; from 0.21, those that were renamed are deferred."""
    if SINCE_0_21 and tool in RENAMED:
        return tool_call("tool_call", calls=[{"name": hermes_name(tool), "arguments": arguments}])
    return tool_call(hermes_name(tool), **arguments)


def tool_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The contents of the tool messages."""
    return [message["content"] for message in messages if message["role"] == "tool"]


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def stream(request: ScriptedRequest, choice: int = 0) -> list[int]:
    """What the model read and said: the prompt's tokens and the sampled ones."""
    return [*request.prompt_ids, *request.output_ids[choice]]


def appended(before: ScriptedRequest, after: ScriptedRequest) -> str:
    """What stands in ``after``'s prompt behind everything that the model read and said in ``before``, as text.

    Fails where ``after``'s prompt does not begin with these very tokens, or does not close the turn once.
    """
    stem = stream(before)
    assert after.prompt_ids[: len(stem)] == stem, "the prompt is not the last prompt, the sampled ids, …"
    rest = after.prompt_ids[len(stem) :]
    if stem[-1] != END:
        assert rest[0] == END, "a turn that was cut off is not closed"
        rest = rest[1:]
    tokenizer = chatml_tokenizer()
    assert END not in rest[: rest.index(START)], "the turn is closed twice"
    text: str = tokenizer.decode(rest)
    assert text.startswith("\n<|im_start|>")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    return text.removeprefix("\n").removesuffix("<|im_start|>assistant\n")


def user_turn(content: str) -> str:
    """A user message in ChatML."""
    return f"<|im_start|>user\n{content}<|im_end|>\n"


def tool_turn(*contents: str) -> str:
    """The tool results between two answers in ChatML."""
    return user_turn("".join(f"\n<tool_response>\n{content}\n</tool_response>" for content in contents)[1:])


def between_answers(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands between two answers of a conversation, in ChatML: results, and what the user said behind them."""
    texts = []
    for is_answer, rows in itertools.groupby(messages, lambda message: message["role"] == "assistant"):
        said = list(rows)
        if not is_answer:
            users = [user_turn(message["content"]) for message in said if message["role"] == "user"]
            texts.append(tool_turn(*tool_texts(said)) + "".join(users))
    return texts[1:]


def check_unbroken(requests: Sequence[ScriptedRequest]) -> list[str]:
    """Each later prompt is the last prompt, the sampled ids, and something new; returns what is new in each."""
    return [appended(before, after) for before, after in itertools.pairwise(requests)]


Span = tuple[tuple[int, ...], tuple[int, ...]]


def check_tokens(result: AgentResult, requests: Sequence[ScriptedRequest]) -> None:
    """The rollout's sequences against the server's record: each sampled token is trainable once, with its logprob.

    Over ``sequences`` a turn that the harness threw away is trained nowhere; over ``all_sequences`` every one is.
    """
    answered = [request for request in requests if request.output_ids and request.output_ids[0]]
    sampled = Counter(map(span_of, answered))  # a script may give the same answer to the same prompt twice
    assert trained_spans(result.all_sequences or result.sequences, answered) == sampled
    trained = trained_spans(result.sequences, answered)
    assert trained <= sampled
    report = result.fidelity
    assert report is not None
    assert report.mismatches == 0
    assert report.tokens_sampled == tokens_in(sampled)
    assert (
        report.tokens_trained == tokens_in(trained) == sum(sequence.trainable_tokens for sequence in result.sequences)
    )
    assert report.tokens_discarded == report.tokens_sampled - report.tokens_trained


def span_of(request: ScriptedRequest) -> Span:
    return tuple(request.prompt_ids), tuple(request.output_ids[0])


def tokens_in(spans: Counter[Span]) -> int:
    return sum(len(output) * times for (_, output), times in spans.items())


def trained_spans(sequences: Sequence[SequenceData], requests: Sequence[ScriptedRequest]) -> Counter[Span]:
    """How often each (prompt, answer) of the server's record is trained; nothing else may be trainable."""
    logprobs_of = {span_of(request): request.logprobs[0] for request in requests}
    trained: Counter[Span] = Counter()
    for sequence in sequences:
        tokens = tuple(sequence.tokens)
        assert len(tokens) == len(sequence.masked_tokens) == len(sequence.logprobs)
        end = 0
        # Something always stands between two answers, so each unmasked run is one answer.
        for masked, run in itertools.groupby(sequence.masked_tokens, key=lambda mask: mask == MASK):
            start, end = end, end + sum(1 for _ in run)
            if masked:
                assert set(sequence.logprobs[start:end]) == {PROMPT_LOGPROB}
                continue
            span = tokens[:start], tokens[start:end]
            assert span in logprobs_of, "what is trainable is no answer of the server's record"
            assert sequence.masked_tokens[start:end] == list(span[1])
            assert sequence.logprobs[start:end] == logprobs_of[span]
            trained[span] += 1
        assert sequence.masked_tokens[-1] != MASK, "nothing stands behind the last answer"
    return trained


# ── What may not be left ─────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """After the block there is no sandbox, thread, process or temporary file that was not there before."""
    wall.etc()  # made once for the process
    folder = tempfile.mkdtemp()
    before = left()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setenv("TMPDIR", folder)
        yield
    for thread in threading.enumerate():
        if thread.ident in left()["threads"].keys() - before["threads"].keys():
            thread.join(LIMIT)
    after = left()
    added = {kind: {key: after[kind][key] for key in after[kind].keys() - before[kind].keys()} for kind in after}
    assert added == {kind: {} for kind in after}, added
    assert [str(path) for path in Path(folder).rglob("*")] == []
    os.rmdir(folder)


async def garbage(rollout: Callable[[], Awaitable[Any]], times: int) -> int:
    """How many objects of so many rollouts only the garbage collector finds; it stops the event loop to look."""
    await rollout()
    gc.collect()
    gc.disable()
    try:
        for _ in range(times):
            await rollout()
        return gc.collect()
    finally:
        gc.enable()


def left() -> dict[str, dict[Any, Any]]:
    """What rollouts could leave, by kind and key, with something that tells what it is."""
    # Pools, and Hermes' own two for the life of the process: one writes its log, one closes idle environments.
    # From 0.20 nemo-relay, which Hermes needs, keeps a pool of its own, and from 0.21 Hermes a scheduler.
    pools = ("hermes-atropos-", "asyncio_", "relay-scope-op_", "hermes-periodic-scheduler")
    hermes = ("(_monitor)", "(_cleanup_thread_worker)")
    threads = [t for t in threading.enumerate() if not t.name.startswith(pools) and not t.name.endswith(hermes)]
    return {
        "sandboxes": {
            **dict.fromkeys(terminal_tool._active_environments, "environment"),
            **dict.fromkeys(terminal_tool._task_env_overrides, "override"),
            **folder._open_tasks,
        },
        "threads": {thread.ident: thread.name for thread in threads},
        "processes": processes(),
        "background processes": dict(process_registry._running),
    }


def processes(owner: int | None = None) -> dict[int, str]:
    """The running processes of the sandboxes of a process (of this one by default), and its children."""
    owner = owner or os.getpid()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent, *_ = entry.joinpath("stat").read_text().rpartition(")")[2].split()
                marked = f"{MARKER}={owner}-".encode() in entry.joinpath("environ").read_bytes()
                ours = template.cache_info().currsize and int(entry.name) == template().pid
                if state != "Z" and (marked or int(parent) == owner) and not ours:
                    found[int(entry.name)] = entry.joinpath("cmdline").read_text().replace("\0", " ")
    return found


# ── Processes of their own ───────────────────────────────────────────────────────────────────────────────────────────


def run_script(
    script: str, cwd: Path, *, limit: int = 100, fresh: bool = False, **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own, with this environment and nothing inherited beside the search path.

    Args:
        limit: seconds that it may take.
        fresh: start an interpreter, whose every import counts; else one that has imported third parties is forked.
    """
    if fresh:
        command, given = [sys.executable, "-c", script], script_environ(cwd, **environ)
        done = subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, timeout=limit, check=False)
    else:
        done = forked(script, cwd, limit, script_environ(cwd, **environ))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


@functools.cache
def template_home() -> tempfile.TemporaryDirectory[str]:
    """What third parties took for the user's home when they were imported; nothing may be in it."""
    return tempfile.TemporaryDirectory()


@functools.cache
def template() -> subprocess.Popen[str]:
    """The process that is forked; it ends with this one."""
    command = [sys.executable, str(Path(__file__).with_name("template.py"))]
    environ = {"PATH": os.environ["PATH"], "HOME": template_home().name, "HF_HUB_OFFLINE": "1", "LANG": "C.UTF-8"}
    process = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.communicate)
    return process


def forked(script: str, cwd: Path, limit: int, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    process = template()
    with tempfile.NamedTemporaryFile("r+") as out, tempfile.NamedTemporaryFile("r+") as err:
        job = {"script": script, "cwd": str(cwd), "environ": environ, "stdout": out.name, "stderr": err.name}
        print(json.dumps(job | {"limit": limit}), file=process.stdin, flush=True)
        assert process.stdout is not None
        answer = process.stdout.readline()
        assert answer, "tests/template.py has ended; its standard error says why"
        assert os.listdir(template_home().name) == []
        code = int(answer)
        return subprocess.CompletedProcess([sys.executable, "-c", script], code, out.read(), err.read())


def script_environ(cwd: Path, **environ: str) -> dict[str, str]:
    root = Path(__file__).parent
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(cwd),
        "PYTHONPATH": os.pathsep.join([str(root.parent), str(root)]),
        "HF_HUB_OFFLINE": "1",
        "LANG": "C.UTF-8",
        **environ,
    }


def until(condition: Callable[[], bool]) -> None:
    """Wait, on another thread's behalf, until a condition that was announced holds; fail after ``LIMIT`` seconds."""
    passed = threading.Event()
    for _ in range(LIMIT * 100):
        if condition():
            return
        passed.wait(0.01)
    raise AssertionError("what was waited for did not happen")
