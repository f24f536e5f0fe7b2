"""What was handed in, or what answers at a URL, and the backend that it becomes."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import wire
from atroposlib.envs.server_handling.managed_server import DummyManagedServer, ManagedServer
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from atroposlib.envs.server_handling.proxy_client import ProxyManagedServer
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_manager import ServerManager
from atroposlib.envs.server_handling.trl_vllm_server import TrlVllmServer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from wire import MODEL, AtroposVLLMWire, OpenAIWire, SGLangWire, VLLMWire, WebsiteWire, Wire

from hermes_atropos.backends.chat import ChatBackend
from hermes_atropos.backends.managed import ExactManagedServer
from hermes_atropos.backends.resolve import resolve
from hermes_atropos.backends.tracked import TrackedBackend
from hermes_atropos.errors import (
    ConfigurationError,
    NoServerError,
    NoTokenizerError,
    UnsupportedServerError,
    UntrackedError,
)
from hermes_atropos.exports import atropos
from hermes_atropos.servers import (
    AtroposVLLMServer,
    OpenAIEndpoint,
    StockSGLangServer,
    StockVLLMServer,
    VLLMGenerateServer,
)
from hermes_atropos.servers.probe import probe
from hermes_atropos.settings import Settings
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer

ASK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ATROPOS_")]:
        monkeypatch.delenv(name)


def manager_of(*servers: Any) -> ServerManager:
    manager = ServerManager([APIServerConfig(base_url="http://x/v1", api_key="k", health_check=False)])
    manager.servers = list(servers)
    return manager


def openai_server(url: str = "http://localhost:1/v1") -> OpenAIServer:
    return OpenAIServer(APIServerConfig(base_url=url, model_name=MODEL, api_key="k", health_check=False))


def other_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: whatever it encodes is encoded otherwise by the small ChatML tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    tokenizer.chat_template = chatml_tokenizer().chat_template
    return tokenizer


# What was handed in


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda server: server,
        lambda server: manager_of(server),
        lambda server: ManagedServer(server, tokenizer=chatml_tokenizer()),
        lambda server: ExactManagedServer(server, tokenizer=chatml_tokenizer()),
    ],
    ids=["APIServer", "ServerManager", "ManagedServer", "ExactManagedServer"],
)
async def test_a_server_with_a_token_call_is_tracked(wrapped: Callable[[Any], Any]) -> None:
    server = ScriptedServer(["Hi."])
    backend = resolve(wrapped(server))
    assert isinstance(backend, TrackedBackend)
    turn = await backend.sample(ASK)
    assert (turn.content, turn.completion_tokens) == ("Hi.", len(server.requests[0].output_ids[0]))


def test_a_tokenizer_given_wins_over_the_servers() -> None:
    tokenizer = other_tokenizer()
    assert resolve(ScriptedServer([]), tokenizer=tokenizer).tokenizer is tokenizer
    managed = ManagedServer(ScriptedServer([]), tokenizer=chatml_tokenizer())
    assert resolve(managed, tokenizer=tokenizer).tokenizer is tokenizer


def test_a_tokenizer_may_be_a_path(tmp_path: Any) -> None:
    chatml_tokenizer().save_pretrained(tmp_path)
    assert resolve(ScriptedServer([]), tokenizer=str(tmp_path)).tokenizer.get_vocab() == chatml_tokenizer().get_vocab()


def test_the_tokenizer_that_the_configuration_names_is_loaded(tmp_path: Any) -> None:
    chatml_tokenizer().save_pretrained(tmp_path)
    server = StockVLLMServer(APIServerConfig(base_url="http://x", model_name=MODEL, tokenizer_name=str(tmp_path)))
    assert resolve(server).tokenizer.get_vocab() == chatml_tokenizer().get_vocab()


def test_no_tokenizer_says_what_to_pass() -> None:
    server = ScriptedServer([])
    server.tokenizer = None
    server.config.model_name = "default"
    with pytest.raises(NoTokenizerError, match="pass tokenizer="):
        resolve(server)
    with pytest.raises(NoTokenizerError, match=r"'no/such' .*pass tokenizer="):
        resolve(server, tokenizer="no/such")


def test_arguments_of_the_tracked_backend_are_handed_on() -> None:
    assert resolve(ScriptedServer([]), context_length=77).context_length == 77


@pytest.mark.parametrize(
    "server",
    [
        openai_server(),
        manager_of(openai_server(), openai_server()),
        DummyManagedServer(ScriptedServer([])),
        DummyManagedServer(openai_server()),
        OpenAIEndpoint(APIServerConfig(base_url="http://x/v1")),
        manager_of(ScriptedServer([]), openai_server()),
    ],
    ids=["OpenAIServer", "ServerManager", "Dummy", "DummyOpenAI", "OpenAIEndpoint", "mixed"],
)
def test_a_server_without_tokens_is_not_tracked_and_needs_no_variable(server: Any) -> None:
    backend = resolve(server, tokenizer=chatml_tokenizer(), context_length=77)
    assert isinstance(backend, ChatBackend)
    assert not backend.tracks_tokens


async def test_a_proxy_session_is_asked_at_its_own_address() -> None:
    class ProxyWire(OpenAIWire):
        def routes(self) -> Any:
            return [wire.web.post("/session-1/v1/chat/completions", self.chat)]

    with ProxyWire(reply="Hi.") as wired:
        backend = resolve(ProxyManagedServer(wired.url, "session-1", model_name=MODEL))
        assert not backend.tracks_tokens
        assert (await backend.sample(ASK)).content == "Hi."


def test_trls_server_forgets_tools_so_they_go_into_the_prompt() -> None:
    server = TrlVllmServer.__new__(TrlVllmServer)
    server.config = APIServerConfig(base_url="http://x")
    backend = resolve(server)
    assert isinstance(backend, ChatBackend)
    assert backend.native_tools is False


def test_a_subclass_with_a_token_call_of_its_own_is_tracked() -> None:
    class Better(OpenAIServer):
        tokenizer = chatml_tokenizer()

        async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
            raise NotImplementedError

    assert resolve(Better(openai_server().config)).tracks_tokens


def test_no_server_says_what_to_pass() -> None:
    with pytest.raises(NoServerError, match=r"pass server= .* or base_url="):
        resolve()
    with pytest.raises(NoServerError, match="at least one APIServerConfig"):
        resolve(manager_of())


@pytest.mark.parametrize("server", [object(), "http://localhost:8000/v1", 7, SimpleNamespace(servers=[object()])])
def test_what_is_no_server_says_what_to_pass(server: Any) -> None:
    with pytest.raises(UnsupportedServerError, match=r"is not an atroposlib server: pass .*base_url="):
        resolve(server)


async def test_bypass_calls_the_endpoint_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    with SGLangWire(reply="Hi.") as wired:
        server = StockSGLangServer(APIServerConfig(base_url=wired.url + "/v1", model_name=MODEL))
        monkeypatch.setenv("ATROPOS_BYPASS_MANAGED_SERVER", "1")
        monkeypatch.setenv("ATROPOS_DIRECT_REQUEST_TIMEOUT_S", "2.5")
        backend = resolve(manager_of(server))
        assert not backend.tracks_tokens
        assert backend.server.config.timeout == 2.5
        assert (await backend.sample(ASK)).content == "Hi."
        assert [request.path for request in wired.requests] == ["/v1/chat/completions"]


def test_bypass_needs_an_address() -> None:
    with pytest.raises(UnsupportedServerError, match="is not a server's address"):
        resolve(ScriptedServer([]), settings=Settings(bypass_managed_server=True))


# What answers at a URL

FOUND = [
    (VLLMWire, {}, StockVLLMServer),
    (VLLMWire, {"release": "old"}, StockVLLMServer),
    (VLLMWire, {"generate": "offered"}, StockVLLMServer),
    (VLLMWire, {"generate": "forbidden"}, StockVLLMServer),
    (VLLMWire, {"generate": "alone"}, VLLMGenerateServer),
    (SGLangWire, {}, StockSGLangServer),
    (AtroposVLLMWire, {}, AtroposVLLMServer),
]


@pytest.mark.parametrize(("make", "options", "expected"), FOUND)
@pytest.mark.parametrize("path", ["", "/v1"])
async def test_the_protocol_is_found_out(make: type[Wire], options: Any, expected: type[Any], path: str) -> None:
    with make(**options) as wired:
        found = await probe(wired.url + path, tokenizer=chatml_tokenizer())
    assert found.problem is None
    assert type(found.server) is expected
    told = make is not AtroposVLLMWire
    assert (found.model, found.context_length) == ((MODEL, 4096) if told else (None, None))
    assert "returns token ids" in str(found)
    assert expected.__name__ in str(found)


@pytest.mark.parametrize("options", [{"release": "ancient"}])
async def test_no_token_ids(options: Any) -> None:
    with VLLMWire(**options) as wired:
        found = await probe(wired.url)
    assert isinstance(found.problem, UntrackedError)
    assert "returns no token ids" in str(found)
    assert type(found.server) is OpenAIEndpoint


async def test_a_plain_openai_endpoint() -> None:
    with OpenAIWire() as wired:
        found = await probe(wired.url)
        assert isinstance(found.problem, UntrackedError)
        assert "serve the model with vLLM" in str(found)
        assert found.server.base_url == f"{wired.url}/v1"


async def test_an_endpoint_that_is_not_under_v1() -> None:
    class Elsewhere(OpenAIWire):
        def routes(self) -> Any:
            return [wire.web.get("/api/beta/openai/models", self.models)]

    with Elsewhere() as wired:
        found = await probe(f"{wired.url}/api/beta/openai")
    assert found.server.base_url == f"{wired.url}/api/beta/openai"


async def test_a_wrong_model_names_the_right_one() -> None:
    with VLLMWire() as wired:
        found = await probe(wired.url, model="other/model")
    assert isinstance(found.problem, ConfigurationError)
    assert "does not serve 'other/model': pass model='tests/chatml'" in str(found)


@pytest.mark.parametrize(("make", "options", "expected"), FOUND)
async def test_a_wrong_tokenizer(make: type[Wire], options: Any, expected: type[Any]) -> None:
    with make(**options) as wired:
        found = await probe(wired.url, tokenizer=other_tokenizer())
    assert isinstance(found.problem, ConfigurationError)
    assert "the tokenizer is not that of the model" in str(found)


async def test_a_tokenizer_that_is_too_small_where_the_server_does_not_encode() -> None:
    class Mute(VLLMWire):
        async def tokenize(self, request: Any) -> Any:
            return wire.web.Response(status=404)

    with Mute() as wired:
        wired.reply = "<tool_call>"  # its id lies beyond the other tokenizer's last
        found = await probe(wired.url, tokenizer=other_tokenizer())
    sampled = chatml_tokenizer().convert_tokens_to_ids("<tool_call>")
    assert f"it has 256 tokens, and the server sampled token {sampled}" in str(found)


async def test_a_url_where_something_else_answers() -> None:
    with WebsiteWire() as wired:
        found = await probe(wired.url)
    assert isinstance(found.problem, NoServerError)
    assert "is not an inference server: correct base_url" in str(found)


async def test_a_url_where_nobody_answers() -> None:
    with wire.nobody() as url:
        found = await probe(url)
    assert isinstance(found.problem, NoServerError)
    assert f"nobody answers at {url}: start the server, or correct base_url" in str(found)


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://x"])
async def test_what_is_no_url(url: str) -> None:
    found = await probe(url)
    assert isinstance(found.problem, UnsupportedServerError)
    assert "give its URL" in str(found)


async def test_a_refused_key() -> None:
    with VLLMWire(api_key="right") as wired:
        found = await probe(wired.url, api_key="wrong")
        assert "refuses the API key: pass api_key=" in str(found)
        assert "wrong" not in str(found)
        assert (await probe(wired.url, api_key="right")).problem is None


async def test_a_server_that_fails_is_not_taken_for_one_without_tokens() -> None:
    with VLLMWire() as wired:
        wired.faults = [wire.status(500, "CUDA on fire")] * 10
        found = await probe(wired.url)
    assert isinstance(found.problem, NoServerError)
    assert "CUDA on fire" in str(found)


@pytest.mark.parametrize("fault", [wire.dropped, wire.status(500, "TypeError: prompt")])
async def test_a_chat_server_that_breaks_on_token_ids_can_chat_all_the_same(fault: Any) -> None:
    with VLLMWire() as wired:
        wired.faults = [fault]
        found = await probe(wired.url)
    assert isinstance(found.problem, UntrackedError)
    assert type(found.server) is OpenAIEndpoint


async def test_of_many_models_the_likely_ones_are_named() -> None:
    class Many(OpenAIWire):
        async def models(self, request: Any) -> Any:
            return wire.web.json_response({"data": [{"id": f"vendor/model-{i}"} for i in range(300)]})

    with Many() as wired:
        found = await probe(wired.url, model="vendor/model_7")
    assert "'vendor/model-7'" in str(found)
    assert len(str(found)) < 250


async def test_a_probe_ends() -> None:
    with VLLMWire() as wired:
        wired.faults = [wire.hanging]
        found = await probe(wired.url, cold_start_s=0.3)
        assert await asyncio.to_thread(wired.to("/v1/completions")[0].hung_up.wait, 30)
    assert isinstance(found.problem, NoServerError)
    assert "did not answer within 0.3 s" in str(found)


async def test_a_probe_samples_at_most_one_token_a_request() -> None:
    for make in (VLLMWire, SGLangWire, AtroposVLLMWire):
        with make() as wired:
            await probe(wired.url, tokenizer=chatml_tokenizer())
            assert len(wired.requests) <= 9
            assert all(len(ids) == 1 for request in wired.requests for ids, _, _ in request.sampled)


@pytest.mark.parametrize(("make", "options", "expected"), FOUND)
async def test_resolve_makes_the_server_itself(make: type[Wire], options: Any, expected: type[Any]) -> None:
    with make(reply="Hi.", **options) as wired:
        backend = await asyncio.to_thread(resolve, base_url=wired.url, tokenizer=chatml_tokenizer())
        assert isinstance(backend, TrackedBackend)
        turn = await backend.sample(ASK)
        assert turn.content == "Hi."
        [(ids, logprobs, _)] = wired.requests[-1].sampled
        [sequence] = backend.ledger.sequences()
        assert sequence.tokens[-len(ids) :] == ids
        assert atropos.logprobs(sequence)[-len(ids) :] == logprobs


def test_resolve_works_where_an_event_loop_runs_and_where_none_does() -> None:
    async def inside(url: str) -> Any:
        return resolve(base_url=url, tokenizer=chatml_tokenizer())

    with VLLMWire() as wired:
        assert asyncio.run(inside(wired.url)).tracks_tokens
        assert resolve(base_url=wired.url, tokenizer=chatml_tokenizer()).tracks_tokens


def test_a_found_server_is_shared_as_long_as_it_is_used() -> None:
    with VLLMWire() as wired:
        first = resolve(base_url=wired.url, tokenizer=chatml_tokenizer())
        asked = len(wired.requests)
        second = resolve(base_url=wired.url, tokenizer=chatml_tokenizer())
        assert second.server is first.server
        assert len(wired.requests) == asked
        del first, second
        gc.collect()
        resolve(base_url=wired.url, tokenizer=chatml_tokenizer())
        assert len(wired.requests) > asked


async def test_a_url_without_token_ids_becomes_untracked_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with OpenAIWire(reply="Hi.") as wired:
        backend = resolve(base_url=wired.url, model=MODEL)
        assert not backend.tracks_tokens
        assert (await backend.sample(ASK)).content == "Hi."
    assert "returns no token ids" in caplog.text


def test_a_url_whose_tokenizer_cannot_be_loaded_says_what_to_pass() -> None:
    with VLLMWire() as wired, pytest.raises(NoTokenizerError, match=r"'tests/chatml' .*pass tokenizer="):
        resolve(base_url=wired.url)


def test_what_is_wrong_at_a_url_is_raised() -> None:
    with VLLMWire() as wired:
        with pytest.raises(ConfigurationError, match="does not serve"):
            resolve(base_url=wired.url, model="other", tokenizer=chatml_tokenizer())
        with pytest.raises(ConfigurationError, match="the tokenizer is not that"):
            resolve(base_url=wired.url, tokenizer=other_tokenizer())
    with pytest.raises(NoServerError, match="nobody answers"), wire.nobody() as url:
        resolve(base_url=url)


def test_a_server_given_wins_over_a_url() -> None:
    server = ScriptedServer([])
    assert resolve(server, base_url="http://localhost:1/v1").server is server
