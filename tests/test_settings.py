"""The environment variables, and what the debug ones show."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hermes_atropos.backends import ModelTurn
from hermes_atropos.errors import ConfigurationError, SettingsError
from hermes_atropos.logs import excerpt, log_exchange, redact
from hermes_atropos.settings import BRIEF, FULL, Settings
from hermes_atropos.toolcalls import ToolCall

SWITCHES = {
    "ATROPOS_BYPASS_MANAGED_SERVER": ("bypass_managed_server", True),
    "ATROPOS_DEBUG_AGENT_REQUEST": ("request_limit", BRIEF),
    "HERMES_DEBUG_ATROPOS_REQUEST": ("request_limit", BRIEF),
    "ATROPOS_DEBUG_AGENT_REQUEST_FULL": ("request_limit", FULL),
    "ATROPOS_DEBUG_AGENT_RESPONSE": ("response_limit", BRIEF),
    "HERMES_DEBUG_ATROPOS_RESPONSE": ("response_limit", BRIEF),
}
SECONDS = {
    "ATROPOS_DIRECT_REQUEST_TIMEOUT_S": "direct_request_timeout_s",
    "ATROPOS_AGENT_CHAT_TIMEOUT_S": "agent_chat_timeout_s",
    "ATROPOS_DEBUG_AGENT_WAIT_EVERY_S": "wait_report_every_s",
}


def test_an_empty_environment_asks_for_nothing() -> None:
    settings = Settings.from_env({})
    assert settings == Settings()
    assert settings.direct_request_timeout_s == 120
    assert settings.threads == 512
    assert (settings.agent_chat_timeout_s, settings.wait_report_every_s) == (None, None)
    assert (settings.bypass_managed_server, settings.request_limit, settings.response_limit) == (False, 0, 0)


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("on", ["1", "true", "YES", " on "])
def test_switches(name: str, on: str) -> None:
    field, value = SWITCHES[name]
    assert getattr(Settings.from_env({name: on}), field) == value
    for off in ("", "0", "false", "No", "off", "  "):
        assert Settings.from_env({name: off}) == Settings()


def test_the_full_request_wins_over_the_brief_one() -> None:
    both = {"ATROPOS_DEBUG_AGENT_REQUEST": "1", "ATROPOS_DEBUG_AGENT_REQUEST_FULL": "1"}
    assert Settings.from_env(both).request_limit == FULL


@pytest.mark.parametrize("name", SECONDS)
def test_seconds(name: str) -> None:
    assert getattr(Settings.from_env({name: " 2.5 "}), SECONDS[name]) == 2.5
    assert Settings.from_env({name: ""}) == Settings()


def test_threads() -> None:
    assert Settings.from_env({"HERMES_ATROPOS_THREADS": "64"}).threads == 64


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, "maybe") for name in SWITCHES],
        *[(name, value) for name in SECONDS for value in ("soon", "-1", "0", "nan", "inf", "1s")],
        *[("HERMES_ATROPOS_THREADS", value) for value in ("0", "-4", "2.5", "many", "٣", "9" * 5000)],
    ],
)
def test_a_value_that_cannot_be_read_is_named_with_what_to_set(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"{name}=.*set it to") as failure:
        Settings.from_env({name: value})
    assert isinstance(failure.value, ConfigurationError)


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Settings().threads = 1  # type: ignore[misc]


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATROPOS_AGENT_CHAT_TIMEOUT_S", "7")
    assert Settings.from_env().agent_chat_timeout_s == 7


# What is logged


def test_an_exchange_is_logged_where_logging_was_never_configured(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("tests.exchange")
    log_exchange(logger, "request 3", {"messages": [{"role": "user", "content": "Hi ☺"}]}, limit=BRIEF)
    assert caplog.messages == ['request 3: {"messages": [{"role": "user", "content": "Hi ☺"}]}']
    assert caplog.records[0].levelno >= logging.WARNING


def test_without_a_limit_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    log_exchange(logging.getLogger("tests.exchange"), "request 3", {"a": 1}, limit=0)
    assert caplog.messages == []


payloads = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(payload=payloads, limit=st.integers(2, 500))
def test_any_payload_fits_the_limit(payload: Any, limit: int) -> None:
    text = excerpt(payload, limit)
    assert len(text) <= limit + len("… [99999999 more characters]")


@given(payload=st.recursive(st.integers() | st.text(alphabet="abc xyz"), lambda s: st.lists(s)))
def test_what_fits_is_shown_as_it_is(payload: Any) -> None:
    assert json.loads(excerpt(payload, 10**6)) == payload


def test_what_is_cut_is_counted() -> None:
    assert excerpt("x" * 100, 10).endswith("more characters]")
    assert "more items" in excerpt({"prompt": list(range(10**6))}, 10**4) or "more characters" in excerpt(
        {"prompt": list(range(10**6))}, 10**4
    )


@pytest.mark.parametrize(
    "secret",
    [
        "sk-proj-abcdefghijklmnop1234",
        "hf_abcdefghijklmnopqrstuvwxyz",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
        "AKIAABCDEFGHIJKLMNOP",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTYifQ.abc-def_123",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_secrets_are_not_shown_wherever_they_stand(secret: str) -> None:
    for payload in (secret, {"content": f"use {secret} now"}, [{"arguments": json.dumps({"command": secret})}]):
        text = excerpt(payload, BRIEF)
        assert secret not in text
        assert json.dumps(secret)[1:-1] not in text
        assert "[redacted]" in text


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Authorization: Bearer abcdefgh12345678", "Authorization: Bearer [redacted]"),
        ("export OPENAI_API_KEY=abcdef1234", "export OPENAI_API_KEY=[redacted]"),
        ("DB_PASSWORD: hunter22", "DB_PASSWORD: [redacted]"),
        ("db_password=hunter22 now", "db_password=[redacted] now"),
        ("postgres://user:hunter22@db/x", "postgres://[redacted]@db/x"),
        ("git clone https://host/x.git", "git clone https://host/x.git"),
        ("max_tokens=4096 and prompt_tokens: 100000", "max_tokens=4096 and prompt_tokens: 100000"),
        ("the token is sampled; a secret garden", "the token is sampled; a secret garden"),
    ],
)
def test_a_line_without_its_secret(line: str, shown: str) -> None:
    assert redact(line) == shown


def test_the_arguments_of_a_call_keep_their_secrets_and_its_schema_is_shown() -> None:
    arguments = json.dumps({"user": "ann", "password": "hunter22", "api_key": "abcd1234"})
    turn = ModelTurn(calls=[ToolCall(name="login", arguments=json.loads(arguments))], content=f"<x>{arguments}</x>")
    for payload in ({"tool_calls": [{"function": {"name": "login", "arguments": arguments}}]}, turn):
        shown = excerpt(payload, BRIEF)
        assert json.loads(shown)
        assert "ann" in shown
        assert "hunter22" not in shown
        assert "abcd1234" not in shown
    schema = {"type": "object", "properties": {"password": {"type": "string"}}, "required": ["password"]}
    assert json.loads(excerpt(schema, BRIEF)) == schema
    assert "xyz" not in excerpt({"credentials": {"type": "account", "user": "xyz"}}, BRIEF)


def test_values_of_telling_keys_are_not_shown() -> None:
    shown = excerpt({"headers": {"Authorization": "abc", "X-Api-Key": "def", "Cookie": "g"}, "max_tokens": 5}, BRIEF)
    assert json.loads(shown) == {
        "headers": {"Authorization": "[redacted]", "X-Api-Key": "[redacted]", "Cookie": "[redacted]"},
        "max_tokens": 5,
    }
