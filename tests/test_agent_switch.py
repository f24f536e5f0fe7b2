"""``/model``: going on with another model, on the server that has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from atroposlib.envs.server_handling.server_manager import ServerManager
from support import QUIET, agent_on, agent_saying, check_tokens, server_of
from wire import MODEL, OpenAIWire, VLLMWire

from hermes_atropos import AtroposAIAgent
from hermes_atropos.errors import ConfigurationError
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def at(wired: OpenAIWire) -> AtroposAIAgent:
    return AtroposAIAgent(base_url=wired.url, model=MODEL, tokenizer=chatml_tokenizer(), **QUIET, enabled_toolsets=[])


class TestAtAnAddress:
    def test_the_new_one_is_asked_and_its_tokens_are_tracked(self) -> None:
        with (
            OpenAIWire(reply="From one.", context_length=100_000) as one,
            VLLMWire(reply="From two.", context_length=30_000) as two,
        ):
            agent = at(one)
            assert not agent.run_conversation("Hello")["trajectory"].tracked
            agent.switch_model(MODEL, "custom", "key", two.url)
            asked = len(one.requests)
            result = agent.run_conversation("Hello again")
            assert result["final_response"] == "From two."
            assert result["trajectory"].tracked
            assert agent.context_compressor.context_length == 30_000
            assert len(one.requests) == asked

    def test_where_nobody_answers_it_stays_as_it_was(self) -> None:
        with OpenAIWire(reply="From one.") as one:
            agent = at(one)
            with pytest.raises(ConfigurationError, match="nobody answers"):
                agent.switch_model(MODEL, "custom", "key", "http://127.0.0.1:9/v1")
            assert agent.run_conversation("Hello")["final_response"] == "From one."
            assert agent.model == MODEL

    def test_with_a_provider_that_answers_itself_it_stays_as_it_was(self) -> None:
        with OpenAIWire(reply="From one.") as one, OpenAIWire(reply="From two.") as two:
            agent = at(one)
            with pytest.raises(ConfigurationError, match="moa"):
                agent.switch_model(MODEL, "moa", "key", two.url)
            assert agent.run_conversation("Hello")["final_response"] == "From one."

    def test_a_model_that_is_not_there(self) -> None:
        with OpenAIWire() as one, pytest.raises(ConfigurationError, match="does not serve 'other'"):
            at(one).switch_model("other", "custom")


class TestOnAServer:
    def test_a_model_that_it_does_not_have_is_refused(self) -> None:
        agent = agent_saying("Hi.", "Hi again.")
        agent.run_conversation("Hello")
        with pytest.raises(ConfigurationError, match="no model 'gpt-5', but scripted"):
            agent.switch_model("gpt-5", "openai", "sk-key", "https://api.openai.com/v1")
        assert (agent.model, agent.provider) == ("scripted", "custom")
        assert agent.run_conversation("Hello")["final_response"] == "Hi again."

    def test_one_of_several_models(self) -> None:
        large, small = (ScriptedServer([f"From {name}."] * 9, model_name=name) for name in ("large", "small"))
        manager = ServerManager.__new__(ServerManager)
        manager.servers = [large, small]
        agent = agent_on(manager, model="large", context_length=50_000)
        agent.switch_model("small", "custom")
        result = agent.run_conversation("Hello")
        assert result["final_response"] == "From small."
        assert result["model"] == "small"
        check_tokens(result["trajectory"], small.requests)
        assert not large.requests

    async def test_copies_ask_it_too(self) -> None:
        agent = agent_saying("Hi.")
        agent.switch_model("scripted", "custom")
        async with agent.task() as task:
            assert (await task.run("Hello"))["final_response"] == "Hi."
        assert len(server_of(agent).requests) == 1
