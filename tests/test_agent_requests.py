"""What Hermes asks for is asked: on chat as Hermes itself asks it, of a token server in its own terms or not at all."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from run_agent import AIAgent
from support import QUIET, SINCE_0_21, agent_on, agent_saying, server_of
from wire import MODEL, OpenAIWire, VLLMWire

from hermes_atropos import AtroposAIAgent
from hermes_atropos.errors import ConfigurationError
from hermes_atropos.hermes import requests
from hermes_atropos.hermes.hooks import HERMES_PARAMETERS, HERMES_ROUTES
from hermes_atropos.hermes.requests import UNASKED_MAX_TOKENS, UNUSED
from hermes_atropos.servers import OpenAIEndpoint
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer

OPTIONS: dict[str, Any] = {**QUIET, "enabled_toolsets": ["todo"], "model": MODEL}

#: Arguments of Hermes that change a request, with values that do.
ARGUMENTS: Mapping[str, dict[str, Any]] = {
    "nothing": {},
    "max_tokens": {"max_tokens": 321},
    "temperature": {"request_overrides": {"temperature": 0.2, "top_p": 0.9}},
    "seed": {"request_overrides": {"seed": 7, "stop": ["END"]}},
    "extra_body": {
        "request_overrides": {"extra_body": {"top_k": 5, "chat_template_kwargs": {"enable_thinking": False}}}
    },
    "service_tier": {"request_overrides": {"service_tier": "priority"}},
    "effort": {"reasoning_config": {"enabled": True, "effort": "high"}},
    "no thinking": {"reasoning_config": {"enabled": False}},
    "ephemeral_system_prompt": {"ephemeral_system_prompt": "Answer in one word."},
    "prefill_messages": {
        "prefill_messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    },
    "providers": {
        **{"providers_allowed": ["one"], "providers_ignored": ["two"], "providers_order": ["one"]},
        **{"provider_sort": "price", "provider_require_parameters": True, "provider_data_collection": "deny"},
        **{"openrouter_min_coding_score": 0.5},
    },
    "no tools": {"enabled_toolsets": [], "disabled_toolsets": ["web"]},
    "prompt": {
        **{"platform": "telegram", "pass_session_id": True, "session_id": "one", "load_soul_identity": False},
        **{"skip_context_files": False, "skip_memory": False},
    },
    "model": {"model": MODEL},
}

#: Arguments of Hermes that change no request: what is shown, called back and kept, and how long a run may be.
ELSEWHERE = frozenset(
    {
        *("max_iterations", "tool_delay", "save_trajectories", "verbose_logging", "quiet_mode", "tool_progress_mode"),
        *("log_prefix_chars", "log_prefix", "service_tier", "iteration_budget", "run_budget_seconds", "session_db"),
        *("parent_session_id", "checkpoints_enabled", "checkpoint_max_snapshots", "checkpoint_max_total_size_mb"),
        *(
            "checkpoint_max_file_size_mb",
            "skip_background_review",
            "side_agent",
            "memory_manager",
            "capabilities",
            "cwd",
        ),
        *("user_id", "user_id_alt", "user_name", "chat_id", "chat_name", "chat_type", "thread_id"),
        *("gateway_session_key", "cwd"),
    }
)

#: The user's configuration where it changes a request to ``URL``.
CONFIGURED: Mapping[str, dict[str, Any]] = {
    "max_tokens": {"model": {"max_tokens": 777}},
    "num_ctx": {"model": {"ollama_num_ctx": 90_000}},
    "extra_body": {"custom_providers": [{"name": "mine", "base_url": "URL", "extra_body": {"top_k": 7}}]},
    "guidance": {"agent": {"tool_use_enforcement": True, "task_completion_guidance": False, "environment_hint": "x"}},
}


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def asked(wired: OpenAIWire) -> dict[str, Any]:
    """The body of the last request for an answer."""
    body: dict[str, Any] = [r for r in wired.requests if r.path.endswith("chat/completions")][-1].body
    return body


def endpoint(wired: OpenAIWire) -> OpenAIEndpoint:
    return OpenAIEndpoint(
        APIServerConfig(base_url=f"{wired.url}/v1", model_name=MODEL, api_key="k", health_check=False)
    )


class TestChat:
    @pytest.mark.parametrize("given", ARGUMENTS.values(), ids=ARGUMENTS.keys())
    def test_the_body_is_that_of_hermes(self, given: dict[str, Any]) -> None:
        with OpenAIWire(context_length=100_000) as theirs, OpenAIWire(context_length=100_000) as ours:
            stock = AIAgent(base_url=f"{theirs.url}/v1", api_key="k", provider="custom", **{**OPTIONS, **given})
            stock._disable_streaming = True
            stock.run_conversation("Hello")
            AtroposAIAgent(server=endpoint(ours), **{**OPTIONS, **given}).run_conversation("Hello")
            expected, body = asked(theirs), asked(ours)
        if expected.get("max_tokens") == UNASKED_MAX_TOKENS:
            del expected["max_tokens"]
        assert body == expected

    def test_an_argument_that_hermes_gets_anew_is_looked_at(self) -> None:
        looked_at = ELSEWHERE | HERMES_ROUTES | set().union(*ARGUMENTS.values())
        assert {name for name in HERMES_PARAMETERS.keys() - looked_at if not name.endswith("_callback")} == {"self"}

    @pytest.mark.parametrize("configured", CONFIGURED.values(), ids=CONFIGURED.keys())
    def test_the_user_s_configuration_is_heeded(
        self, configured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HERMES_HOME", str(tmp_path))
        bodies = []
        for kind in (AIAgent, AtroposAIAgent):
            with OpenAIWire(context_length=100_000) as wired:
                url = f"{wired.url}/v1"
                (tmp_path / "config.yaml").write_text(json.dumps(configured).replace("URL", url))
                agent = kind(base_url=url, api_key="k", provider="custom", **OPTIONS)
                agent._disable_streaming = True
                agent.run_conversation("Hello")
                bodies.append(asked(wired))
        [expected, body] = bodies
        if expected.get("max_tokens") == UNASKED_MAX_TOKENS:
            del expected["max_tokens"]
        assert body == expected

    @pytest.mark.parametrize("provider", [None, "custom", "deepseek"])
    def test_hermes_knows_the_provider(self, provider: str | None) -> None:
        thoughtless: dict[str, Any] = {"reasoning_config": {"enabled": False}}
        bodies = []
        for kind in (AIAgent, AtroposAIAgent):
            with OpenAIWire(context_length=100_000) as wired:
                agent = kind(base_url=f"{wired.url}/v1", api_key="k", provider=provider, **OPTIONS, **thoughtless)
                agent._disable_streaming = True
                agent.run_conversation("Hello")
                bodies.append({name: value for name, value in asked(wired).items() if name != "max_tokens"})
        assert bodies[0] == bodies[1]
        said = "reasoning_effort" if SINCE_0_21 else "think"  # of a server that is not Ollama's
        assert (said in bodies[0]) is (provider == "custom")

    @pytest.mark.parametrize("name", sorted(UNUSED.keys() & HERMES_PARAMETERS.keys()))
    def test_what_is_not_used_is_named(self, name: str, caplog: pytest.LogCaptureFixture) -> None:
        requests._warn_of_unused.cache_clear()
        for _ in range(2):
            agent_saying("Hi.", **{name: {"provider": "openrouter", "model": "other"}}).chat("Hello")
        [said] = [record.getMessage() for record in caplog.records if record.name.startswith("hermes_atropos")]
        assert f"AIAgent({name}=…) is not used" in said

    def test_several_models_at_once_are_refused(self) -> None:
        with OpenAIWire() as wired, pytest.raises(ConfigurationError, match="provider='moa'"):
            AtroposAIAgent(base_url=f"{wired.url}/v1", api_key="k", provider="moa", **OPTIONS)

    def test_what_the_constructor_is_given_wins_over_the_overrides(self) -> None:
        overrides = {"temperature": 0.2, "top_p": 0.8, "extra_body": {"top_k": 3, "priority": 1}}
        with OpenAIWire() as wired:
            agent = AtroposAIAgent(
                server=endpoint(wired), temperature=0.7, top_k=9, request_overrides=overrides, **OPTIONS
            )
            result = agent.run_conversation("Hello")
            body = asked(wired)
        wanted = {"temperature": 0.7, "top_p": 0.8, "top_k": 9, "priority": 1}
        assert {name: body[name] for name in wanted} == wanted
        assert result["trajectory"].sampling["temperature"] == 0.7
        assert result["trajectory"].sampling["top_p"] == 0.8


THINKING = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>
</think>
{% endif %}{% if reasoning_effort is defined %}[{{ reasoning_effort }}]{% endif %}{% endif %}"""


class TestTokens:
    def test_overrides_that_a_sampler_knows(self) -> None:
        overrides = {"temperature": 0.2, "top_p": 0.9, "seed": 5, "extra_body": {"priority": 3}}
        agent = agent_saying("Hi.", request_overrides=overrides)
        result = agent.run_conversation("Hello")
        sampling = server_of(agent).requests[0].sampling
        assert (sampling["temperature"], sampling["top_p"], sampling["priority"]) == (0.2, 0.9, 3)
        assert result["trajectory"].sampling == overrides

    @pytest.mark.parametrize("name", ["service_tier", "tool_choice", "speed", "reasoning", "temprature"])
    def test_what_only_chat_endpoints_know_is_refused(self, name: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"request_overrides\['{name}'\]"):
            agent_saying("Hi.", request_overrides={name: "x"})

    @pytest.mark.parametrize(
        ("reasoning", "opening"),
        [
            (None, "assistant\n"),
            ({"enabled": False}, "assistant\n<think>\n</think>\n"),
            ({"enabled": True}, "assistant\n"),
            ({"enabled": True, "effort": "high"}, "assistant\n[high]"),
        ],
    )
    def test_reasoning_is_the_template_s_own_switch(self, reasoning: Any, opening: str) -> None:
        tokenizer = copy.deepcopy(chatml_tokenizer())
        tokenizer.chat_template = THINKING
        agent = agent_on(ScriptedServer(["Hi."], tokenizer=tokenizer), reasoning_config=reasoning, enabled_toolsets=[])
        agent.run_conversation("Hello")
        assert server_of(agent).requests[0].prompt.endswith(opening)

    def test_arguments_of_the_template_are_not_sent_but_rendered(self) -> None:
        tokenizer = copy.deepcopy(chatml_tokenizer())
        tokenizer.chat_template = THINKING
        overrides = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}, "priority": 3}}
        agent = agent_on(ScriptedServer(["Hi."], tokenizer=tokenizer), request_overrides=overrides, enabled_toolsets=[])
        agent.run_conversation("Hello")
        [request] = server_of(agent).requests
        assert request.prompt.endswith("<think>\n</think>\n")
        assert "chat_template_kwargs" not in request.sampling
        assert request.sampling["priority"] == 3

    @pytest.mark.parametrize("extra", [{"top_k": 7}, {"chat_template_kwargs": {"enable_thinking": False}}])
    def test_what_the_configuration_asks_of_its_address(
        self, extra: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HERMES_HOME", str(tmp_path))
        with VLLMWire(context_length=100_000) as wired:
            url = f"{wired.url}/v1"
            entry = {"name": "mine", "base_url": url, "extra_body": extra}
            (tmp_path / "config.yaml").write_text(json.dumps({"custom_providers": [entry]}))

            def ask() -> None:
                AtroposAIAgent(
                    base_url=url, api_key="k", provider="custom", tokenizer=chatml_tokenizer(), **OPTIONS
                ).run_conversation("Hello")

            if "top_k" in extra:
                ask()
                assert wired.to("/v1/completions")[-1].body["top_k"] == 7
            else:
                with pytest.raises(ConfigurationError, match="custom_providers"):
                    ask()

    @pytest.mark.parametrize("reasoning", [{"enabled": False}, {"enabled": True, "effort": "high"}])
    def test_a_template_without_a_switch_refuses_it(self, reasoning: Any) -> None:
        with pytest.raises(ConfigurationError, match="reasoning_config"):
            agent_saying("Hi.", reasoning_config=reasoning)

    def test_hermes_own_words_for_chat_endpoints_are_not_sent(self) -> None:
        agent = agent_saying("Hi.", max_tokens=77)
        agent.run_conversation("Hello")
        assert server_of(agent).requests[0].sampling["max_tokens"] == 77
