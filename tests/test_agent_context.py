"""How long Hermes takes the model's context for, and what it does when that is full."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
from agent.model_metadata import DEFAULT_FALLBACK_CONTEXT
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from support import QUIET, agent_on, agent_saying, check_tokens, run_script, server_of, terminal
from wire import MODEL, OpenAIWire, VLLMWire, status

from hermes_atropos import AtroposAIAgent, StopReason
from hermes_atropos.errors import BackendResponseError, ConfigurationError, ContextLengthError
from hermes_atropos.runtime import portal_loop
from hermes_atropos.servers import StockVLLMServer
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer
from hermes_atropos.tokens import BreakCause


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def scripted(replies: Any, context_length: int | None) -> ScriptedServer:
    """A server with a context of its own."""
    server = ScriptedServer(replies)
    server.context_length = context_length  # type: ignore[attr-defined]
    return server


def length_of(agent: AtroposAIAgent) -> int:
    length: int = agent.context_compressor.context_length
    return length


class TestLength:
    @pytest.mark.parametrize("length", [20_000, 64_000, 131_072])
    @pytest.mark.parametrize("kind", [OpenAIWire, VLLMWire])
    def test_it_is_what_the_server_lists(self, kind: type[OpenAIWire], length: int) -> None:
        with kind(context_length=length) as wired:
            agent = AtroposAIAgent(base_url=wired.url, model=MODEL, tokenizer=chatml_tokenizer(), **QUIET)
            assert length_of(agent) == length
            assert agent.context_compressor.threshold_tokens < length

    def test_the_smallest_of_several_servers(self) -> None:
        with VLLMWire(context_length=50_000) as one, VLLMWire(context_length=30_000) as two:
            configs = [
                APIServerConfig(base_url=wired.url, model_name=MODEL, api_key="k", health_check=False)
                for wired in (one, two)
            ]
            manager = ServerManager(configs, server_class=StockVLLMServer)
            agent = AtroposAIAgent(server=manager, tokenizer=chatml_tokenizer(), **QUIET)
            assert length_of(agent) == 30_000

    def test_each_server_is_asked_once(self) -> None:
        with OpenAIWire(context_length=50_000) as wired:
            config = APIServerConfig(base_url=wired.url, model_name=MODEL, api_key="k", health_check=False)
            server = StockVLLMServer(config)
            for _ in range(3):
                AtroposAIAgent(server=server, tokenizer=chatml_tokenizer(), **QUIET)
            assert [request.path for request in wired.requests] == ["/v1/models"]

    def test_what_the_constructor_is_given_wins(self) -> None:
        agent = agent_on(scripted(["Hi."], 30_000), context_length=25_000)
        assert length_of(agent) == 25_000
        assert agent.run_conversation("Hello")["final_response"] == "Hi."
        assert server_of(agent).requests[0].sampling["max_tokens"] < 25_000

    @pytest.mark.parametrize("given", [0, -1, 1.5, "20000", True])
    def test_what_is_no_length_is_refused(self, given: Any) -> None:
        with pytest.raises(ConfigurationError, match="context_length"):
            agent_saying("Hi.", context_length=given)

    def test_the_user_s_configuration_wins_over_the_server(self, tmp_path: Path) -> None:
        (tmp_path / "config.yaml").write_text("model: {context_length: 40000}\n")
        script = (
            "from support import agent_saying\n"
            "agent = agent_saying('Hi.')\n"
            "agent._backend.server.context_length = 30000\n"
            "print(agent.context_compressor.context_length)"
        )
        assert run_script(script, tmp_path, HERMES_HOME=str(tmp_path)).stdout.splitlines()[-1] == "40000"

    def test_where_nobody_says_it_is_hermes_default(self) -> None:
        with OpenAIWire(context_length=None) as wired:
            agent = AtroposAIAgent(base_url=wired.url, model=MODEL, **QUIET)
            assert length_of(agent) == DEFAULT_FALLBACK_CONTEXT

    async def test_a_server_on_the_loop_that_constructs_is_asked_by_the_first_run(self) -> None:
        with OpenAIWire(context_length=20_000) as wired:
            url = f"{wired.url}/v1"
            config = APIServerConfig(base_url=url, model_name=MODEL, api_key="k", health_check=False)
            agent = AtroposAIAgent(server=OpenAIServer(config), **QUIET)
            await agent.run_conversation_async("Hello")
            assert length_of(agent) == 20_000

    async def test_a_threshold_that_was_set_before_the_server_answered_stays(self) -> None:
        answer = threading.Event()
        portal_loop().call_soon_threadsafe(answer.wait)
        agent = agent_on(scripted(["Hi."], 20_000))
        assert length_of(agent) == DEFAULT_FALLBACK_CONTEXT
        agent.context_compressor.threshold_tokens = 15_000
        agent._context.correct(agent)  # as a run does that begins before the answer
        answer.set()
        await agent.run_conversation_async("Hello")
        assert length_of(agent) == 20_000
        assert agent.context_compressor.threshold_tokens == 15_000

    async def test_copies_and_subagents_have_it_too(self) -> None:
        agent = agent_on(scripted(["Hi."], 30_000), context_length=25_000)
        async with agent.task() as task:
            assert length_of(task._agent) == 25_000


#: Words that are one token each, so that a token has about the four characters by which Hermes estimates.
WORDS = "description properties arguments command function"


def counting(turns: int, lines: int = 150) -> Any:
    """A model that runs a command a turn, and answers what asks for a summary."""

    def model(messages: list[dict[str, str]]) -> str:
        if "<tools>" not in messages[0]["content"]:
            return "## Goal\nCount.\n## Progress\nCounted so far."
        asked.append(len(messages))
        return terminal(f"seq -f '{WORDS} %g' {len(asked)} {len(asked) + lines}") if len(asked) < turns else "Counted."

    asked: list[int] = []
    return model


class TestCompression:
    async def test_sixty_thousand_tokens_of_work_in_twenty_thousand(self) -> None:
        """By its threshold, without one call that has no room, and each token exact."""
        server = scripted(counting(80, lines=100), 20_000)
        agent = agent_on(server, max_iterations=100, enabled_toolsets=["terminal"])
        agent.compression_enabled = True
        result = await agent.run_conversation_async("Please count.")
        assert result["final_response"] == "Counted."
        trajectory = result["trajectory"]
        check_tokens(trajectory, server.requests)
        summaries = [request for request in server.requests if "<tools>" not in request.prompt]
        assert max(len(request.prompt_ids) for request in server.requests) < 20_000
        grown = [
            len(after.prompt_ids) - len(before.prompt_ids) for before, after in itertools.pairwise(server.requests)
        ]
        assert sum(length for length in grown if length > 0) > 60_000
        assert trajectory.fidelity is not None
        assert trajectory.fidelity.breaks == {BreakCause.HISTORY_REWRITTEN: len(summaries)}

    @pytest.mark.parametrize(
        "refusal",
        [
            BackendResponseError("too large", status=413, body="Request Entity Too Large"),
            ContextLengthError("too long", status=400, body="This model's maximum context length is 90000 tokens."),
            ContextLengthError("the prompt has 9 tokens, the context 8", attempts=0),
        ],
        ids=["413", "400", "ours"],
    )
    def test_a_prompt_that_is_refused_is_compressed(self, refusal: Exception) -> None:
        refused: list[bool] = []

        def model(messages: list[dict[str, str]]) -> str | Reply:
            if "<tools>" in messages[0]["content"] and len(server.requests) == 12 and not refused:
                refused.append(True)
                return Reply(error=refusal)
            answer: str = count(messages)
            return answer

        count = counting(15)
        server = ScriptedServer(model)
        agent = agent_on(server)
        agent.compression_enabled = True
        agent.context_compressor.tail_token_budget = 1000
        result = agent.run_conversation("Please count.")
        assert refused
        assert result["final_response"] == "Counted."
        assert any("<tools>" not in request.prompt for request in server.requests)
        assert result["trajectory"].fidelity.breaks == {BreakCause.HISTORY_REWRITTEN: 1}

    def test_without_compression_the_rollout_ends_with_the_cause(self) -> None:
        refusal = ContextLengthError("too long", status=400, body="maximum context length is 90000 tokens")
        agent = agent_saying(terminal("echo hi"), Reply(error=refusal))
        result = agent.run_conversation("Go.")
        assert result["stop_reason"] is StopReason.CONTEXT_LENGTH
        assert result["cause"] is refusal
        assert len(server_of(agent).requests) == 2


def test_an_answer_that_was_asked_too_long_is_asked_shorter() -> None:
    """Hermes reads of the refusal how much room there is."""
    refusal = (
        "This model's maximum context length is 8192 tokens. However, you requested 6000 output tokens and your prompt "
        "contains at least 5192 input tokens, for a total of at least 11192 tokens. (available_tokens: 3000)"
    )
    with OpenAIWire(context_length=8192) as wired:
        wired.faults.append(status(400, refusal))
        agent = AtroposAIAgent(base_url=wired.url, model=MODEL, max_tokens=6000, **QUIET, enabled_toolsets=[])
        assert agent.run_conversation("Hello")["final_response"] == "Hello there."
        asked = [request.body["max_tokens"] for request in wired.requests if request.path.endswith("chat/completions")]
    assert asked[0] == 6000
    assert asked[1] < 3000
