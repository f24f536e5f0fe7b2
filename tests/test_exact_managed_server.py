"""ExactManagedServer: what environments ask of atroposlib's managed server, and none of that one's faults."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from atroposlib.envs.server_handling import managed_server_proxy
from atroposlib.envs.server_handling.managed_server import ManagedServerAdapter, SequenceNode
from atroposlib.envs.server_handling.openai_server import OpenAIServer
from atroposlib.envs.server_handling.server_baseline import APIServerConfig
from atroposlib.envs.server_handling.server_harness import ServerHarness
from starlette.testclient import TestClient

from hermes_atropos.backends import tracked
from hermes_atropos.backends.managed import ExactManagedServer
from hermes_atropos.errors import BackendResponseError, NoTokenizerError, TokenFidelityError, UnsupportedServerError
from hermes_atropos.exports.atropos import MASK, PROMPT_LOGPROB
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.servers.sampling import NEUTRAL
from hermes_atropos.testing import Reply, ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.testing.tokenizer import CHATML_TEMPLATE

END = chatml_tokenizer().convert_tokens_to_ids("<|im_end|>")
TOOLS = [{"type": "function", "function": {"name": "ls", "parameters": {"type": "object", "properties": {}}}}]

Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def templated(template: str) -> Any:
    tokenizer = copy.deepcopy(chatml_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def on(*replies: str | Reply, tokenizer: Any = None, **options: Any) -> tuple[ExactManagedServer, ScriptedServer]:
    server = ScriptedServer(list(replies), tokenizer=tokenizer)
    return ExactManagedServer(server, **options), server


def check(managed: ExactManagedServer, server: ScriptedServer) -> list[SequenceNode]:
    """The nodes against the server's record: each is a prompt and its answer, and each answer is trained in one."""
    nodes: list[SequenceNode] = managed.get_state()["nodes"]
    sampled = Counter(
        (tuple(request.prompt_ids), tuple(output_ids), tuple(logprobs))
        for request in server.requests
        for output_ids, logprobs in zip(request.output_ids, request.logprobs, strict=True)
        if output_ids
    )
    streams = {(*prompt_ids, *output_ids) for prompt_ids, output_ids, _ in sampled}
    trained: Counter[Any] = Counter()
    for node in nodes:
        assert tuple(node.tokens) in streams
        assert len(node.tokens) == len(node.masked_tokens) == len(node.logprobs)
        masked = set(range(len(node.tokens)))
        for start, end in ((turn["start"], turn["end"]) for turn in turns_of(node)):
            if node.masked_tokens[start] != MASK:
                assert node.masked_tokens[start:end] == node.tokens[start:end]
                trained[tuple(node.tokens[:start]), tuple(node.tokens[start:end]), tuple(node.logprobs[start:end])] += 1
                masked -= set(range(start, end))
        assert all(node.masked_tokens[place] == MASK and node.logprobs[place] == PROMPT_LOGPROB for place in masked)
    assert trained == sampled
    return nodes


def turns_of(node: SequenceNode) -> list[dict[str, Any]]:
    assert node.metadata is not None
    turns: list[dict[str, Any]] = node.metadata["turns"]
    return turns


async def say(managed: ExactManagedServer, messages: Sequence[Any], **options: Any) -> Any:
    """The message of the first choice."""
    return (await managed.chat_completion(messages=messages, **options)).choices[0].message


# ── What environments ask of a managed server ────────────────────────────────────────────────────────────────────────


async def test_a_conversation_is_one_node_whose_every_answer_is_trained() -> None:
    managed, server = on("Hello.", "Fine.", "Bye.")
    messages: list[Any] = [{"role": "system", "content": "Be kind."}]
    for question in ("Hi", "How are you?", "Bye"):
        messages.append(user(question))
        messages.append(assistant((await say(managed, messages, temperature=1.0, max_tokens=64)).content))
    (node,) = check(managed, server)
    assert sum(mask != MASK for mask in node.masked_tokens) == sum(
        len(request.output_ids[0]) for request in server.requests
    )
    assert node.full_text == chatml_tokenizer().decode(node.tokens)
    assert node.metadata is not None
    assert node.metadata["finish_reason"] == "stop"


async def test_a_completion_has_what_openais_has() -> None:
    managed, server = on("Hello.")
    completion = await managed.chat_completion(messages=[user("Hi")], model="whatever")
    assert completion.object == "chat.completion"
    assert completion.model == server.config.model_name
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].message.content == "Hello."
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(server.requests[0].prompt_ids)
    assert completion.usage.completion_tokens == len(server.requests[0].output_ids[0])
    json.dumps(completion.model_dump())


async def test_group_completions_are_nodes_that_go_on_each_on_its_own() -> None:
    managed, server = on(*"abcd", *"wxyz")
    group = await managed.chat_completion(messages=[user("Hi")], n=4)
    for choice in reversed(group.choices):
        await say(managed, [user("Hi"), assistant(choice.message.content), user("And?")])
    nodes = check(managed, server)
    tails = [[node.full_text.count(letter) for node in nodes] for letter in ("a<|im_end|>", "d<|im_end|>")]
    assert tails == [[1, 0, 0, 0], [0, 0, 0, 1]], "the nodes are in the order of the choices"
    assert all(len(turns_of(node)) == 2 for node in nodes)


async def test_another_system_prompt_is_another_node() -> None:
    managed, server = on("Hello.", "Bye.")
    answer = await say(managed, [user("Hi")])
    await say(managed, [{"role": "system", "content": "Be kind."}, user("Hi"), assistant(answer.content), user("And?")])
    first, second = check(managed, server)
    assert first.masked_tokens[-1] == second.masked_tokens[-1] == END
    assert sum(mask != MASK for mask in second.masked_tokens) == len(server.requests[1].output_ids[0])


async def test_the_answers_own_message_can_be_handed_back_and_finds_its_node() -> None:
    managed, server = on("Hello.", "Hello.", "Bye.")
    one, two = (choice.message for choice in (await managed.chat_completion(messages=[user("Hi")], n=2)).choices)
    then = await say(managed, [user("Hi"), two, user("And?")])
    first, second = check(managed, server)
    assert [turn["ref"] for turn in turns_of(first)] == [getattr(one, TURN_KEY)]
    assert [turn["ref"] for turn in turns_of(second)] == [getattr(two, TURN_KEY), getattr(then, TURN_KEY)]
    assert managed.ledger.locate([user("Hi"), two.model_dump(), user("And?")]).turn is managed.ledger.turns[1]


async def test_track_tree_has_a_node_a_turn_trained_on_that_turn_alone() -> None:
    managed, server = on("Hello.", "Bye.", track_tree=True)
    answer = await say(managed, [user("Hi")])
    await say(managed, [user("Hi"), assistant(answer.content), user("And?")])
    state = managed.get_state()
    assert state["sequences"] == state["tree"] == managed.sequences
    for (text, node), request in zip(state["sequences"].items(), server.requests, strict=True):
        assert text == node.full_text
        assert node.tokens == request.prompt_ids + request.output_ids[0]
        assert node.masked_tokens == [MASK] * len(request.prompt_ids) + request.output_ids[0]
        assert node.logprobs == [PROMPT_LOGPROB] * len(request.prompt_ids) + request.logprobs[0]


async def test_track_tree_keeps_turns_apart_that_say_the_same() -> None:
    managed, _ = on("Hello.", "Hello.", track_tree=True)
    await managed.chat_completion(messages=[user("Hi")], n=2)
    assert len(managed.get_state()["sequences"]) == 2


async def test_reset_forgets_and_what_was_handed_out_stays() -> None:
    managed, server = on("Hello.", "Hello.")
    await say(managed, [user("Hi")])
    nodes = check(managed, server)
    managed.reset()
    assert managed.get_state() == {"nodes": []}
    assert len(nodes) == 1
    await say(managed, [user("Hi")])
    assert len(managed.current_nodes) == 1


async def test_raw_completions_extend_their_node() -> None:
    managed, server = on(Reply(" World", finish_reason="length"), Reply("!", finish_reason="length"), " Bye")
    first = await managed.completion(prompt="Hello", max_tokens=8)
    assert (first.choices[0].text, first.choices[0].finish_reason) == (" World", "length")
    second = await managed.completion(prompt="Hello World, again")
    assert second.choices[0].text == "!"
    await managed.completion(prompt="Goodbye")
    again, other = check(managed, server)
    assert again.full_text == "Hello World, again!"
    assert again.tokens[: len(server.requests[0].prompt_ids)] == server.requests[0].prompt_ids
    assert other.full_text == "Goodbye Bye<|im_end|>"


async def test_raw_completions_of_one_prompt_are_siblings() -> None:
    managed, server = on(" World", " There", " Friend", " You")
    group = await managed.completion(prompt="Hello", n=3)
    await managed.completion(prompt="Hello")
    assert [choice.text for choice in group.choices] == [" World", " There", " Friend"]
    assert len(check(managed, server)) == 4
    assert managed.ledger.report().breaks == {}


async def test_logprobs_of_a_prompt_come_from_the_server() -> None:
    managed, server = on()
    asked: list[dict[str, Any]] = []

    async def get_logprobs(**kwargs: Any) -> dict[str, Any]:
        asked.append(kwargs)
        return {"prompt_tokens": [1], "prompt_topk_token_ids": [[1]], "prompt_topk_logprobs": [[-0.1]]}

    server.get_logprobs = get_logprobs
    payload = await managed.get_logprobs(messages=[user("Hi")], top_k=1)
    await managed.get_logprobs(prompt="Hi", n=1)
    await managed.get_logprobs(input_ids=[1, 2])
    assert payload["prompt_topk_logprobs"] == [[-0.1]]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert asked == [{"prompt": text, "top_k": 1}, {"prompt": "Hi", "n": 1}, {"input_ids": [1, 2]}]


async def test_it_serves_atroposlibs_openai_shaped_adapter() -> None:
    managed, server = on("Hello.")
    client = ManagedServerAdapter(managed, base_url="http://model/v1")
    completion = await client.chat.completions.create(messages=[user("Hi")])
    assert completion.choices[0].message.content == "Hello."
    assert len(check(managed, server)) == 1


def test_the_tokenizer_is_the_servers_unless_given() -> None:
    server = ScriptedServer([])
    assert ExactManagedServer(server).tokenizer is server.tokenizer
    with pytest.raises(NoTokenizerError, match="pass tokenizer="):
        ExactManagedServer(ServerHarness())


# ── One test for each of its faults ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tools", [None, TOOLS])
async def test_the_end_of_a_turn_is_not_doubled(tools: Any) -> None:
    managed, server = on("I look. " + tool_call("ls"), "Three.", "Bye.")
    answer = await say(managed, [user("Look")], tools=tools)
    back = answer.model_dump(exclude_none=True) if tools else assistant(answer.content)
    messages = [
        user("Look"),
        back,
        {"role": "tool", "tool_call_id": "x", "content": "a b c"} if tools else user("And?"),
    ]
    answer = await say(managed, messages, tools=tools)
    await say(managed, [*messages, assistant(answer.content), user("Bye")], tools=tools)
    (node,) = check(managed, server)
    assert (END, END) not in itertools.pairwise(node.tokens)
    assert node.tokens.count(END) == 6 + bool(tools)
    assert node.tokens == server.requests[2].prompt_ids + server.requests[2].output_ids[0]


TRIMS = CHATML_TEMPLATE.replace("(message.content or '')", "(message.content or '') | trim")
OPENS_THINKING = CHATML_TEMPLATE.replace(
    "'<|im_start|>assistant\\n' }}{%- endif", "'<|im_start|>assistant\\n<think>\\n' }}{%- endif"
)


@pytest.mark.parametrize(
    ("template", "sampled", "kept"),
    [
        (CHATML_TEMPLATE, "  Hello.\n\n", assistant("Hello.")),
        (TRIMS, "  Hello.\n\n", assistant("  Hello.\n\n")),
        (CHATML_TEMPLATE, "<think>\nHm.\n</think>\n\nHello.", assistant("Hello.", reasoning_content="Hm.")),
        (OPENS_THINKING, "Hm.\n</think>\n\nHello.", assistant("Hello.", reasoning_content="Hm.")),
        (
            CHATML_TEMPLATE,
            'I look.\n<tool_call>\n{"arguments":{"b": 1,  "a":"é"},"name":"ls"}\n</tool_call>',
            assistant(
                "I look.",
                tool_calls=[
                    {"id": "x", "type": "function", "function": {"name": "ls", "arguments": '{"a": "\\u00e9", "b": 1}'}}
                ],
            ),
        ),
    ],
    ids=["stripped by the harness", "trimmed by the template", "thinking moved", "thinking opened", "calls rewritten"],
)
async def test_a_difference_in_text_is_no_new_node(template: str, sampled: str, kept: Message) -> None:
    managed, server = on(sampled, "Bye.", tokenizer=templated(template))
    await say(managed, [user("Hi")], tools=TOOLS)
    await say(managed, [user("Hi"), kept, {"role": "tool", "tool_call_id": "x", "content": "a"}], tools=TOOLS)
    nodes = check(managed, server)
    assert len(nodes) == 1, "a sampled answer was rendered again"
    assert len(turns_of(nodes[0])) == 2


async def test_the_longest_continued_text_wins() -> None:
    managed, server = on("", "I", "I see", "Bye.", "Go.")
    await managed.chat_completion(messages=[user("Hi")], n=3)
    await say(managed, [user("Hi"), assistant("I see"), user("And?")])
    await say(managed, [user("Hi"), assistant(""), user("And?")])
    nodes = check(managed, server)
    assert [chatml_tokenizer().decode(server.requests[place].prompt_ids).count("I see") for place in (1, 2)] == [1, 0]
    assert sorted(len(turns_of(node)) for node in nodes) == [1, 2, 2]


async def test_the_longest_continued_raw_text_wins() -> None:
    replies = [Reply(text, finish_reason="length") for text in ("", " I", " I see", " more")]
    managed, server = on(*replies)
    await managed.completion(prompt="So", n=3)
    await managed.completion(prompt="So I see it")
    stem = server.requests[0].prompt_ids + server.requests[0].output_ids[2]
    assert server.requests[1].prompt_ids[: len(stem)] == stem
    assert managed.ledger.turns[3].before is managed.ledger.turns[2]
    check(managed, server)


async def test_raw_completions_keep_the_masks_of_earlier_turns() -> None:
    managed, server = on("One", "Two")
    await managed.completion(prompt="Count:")
    await managed.completion(prompt="Count:One<|im_end|>\nNext:")
    (node,) = check(managed, server)
    trained = [token for token, mask in zip(node.tokens, node.masked_tokens, strict=True) if mask != MASK]
    assert trained == server.requests[0].output_ids[0] + server.requests[1].output_ids[0]
    assert node.tokens.count(END) == 2


async def test_a_raw_text_that_leaves_out_the_end_token_is_another_node() -> None:
    managed, server = on("One", "Two")
    await managed.completion(prompt="Count:")
    await managed.completion(prompt="Count:One, and")
    first, second = check(managed, server)
    assert first.tokens[-1] == END
    assert END not in server.requests[1].prompt_ids
    assert second.tokens[: len(server.requests[1].prompt_ids)] == server.requests[1].prompt_ids


class ShortOfLogprobs(ScriptedServer):
    async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
        echo, outputs, logprobs, reasons = await super()._tokens_and_logprobs_completion_wrapper(**kwargs)
        return echo, outputs, [values[:-1] for values in logprobs], reasons


async def test_missing_logprobs_are_not_made_up() -> None:
    managed = ExactManagedServer(ShortOfLogprobs(["Hello."]))
    with pytest.raises(TokenFidelityError, match="as many logprobs"):
        await say(managed, [user("Hi")])
    assert managed.get_state()["nodes"] == []
    assert managed.ledger.report().mismatches == 1


async def test_an_auxiliary_call_does_not_become_the_current_node() -> None:
    managed, server = on("Hello.", "A title", "Bye.")
    answer = await say(managed, [user("Hi")])
    await say(managed, [user("Give this conversation a title.")])
    then = await say(managed, [user("Hi"), answer, user("And?")])
    main, auxiliary = check(managed, server)
    assert [turn["ref"] for turn in turns_of(main)] == [getattr(answer, TURN_KEY), getattr(then, TURN_KEY)]
    assert "title" in auxiliary.full_text


@pytest.mark.parametrize("parser", [None, "hermes"])
async def test_tools_are_rendered_and_calls_parsed_without_vllm(parser: str | None) -> None:
    managed, server = on("I look. " + tool_call("ls", path="é") + "\n" + tool_call("ls"), tool_parser=parser)
    completion = await managed.chat_completion(messages=[user("Look")], tools=TOOLS, tool_choice="auto")
    assert '"name": "ls"' in server.requests[0].prompt
    (choice,) = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    assert choice.message.tool_calls is not None
    assert [call.function.name for call in choice.message.tool_calls] == ["ls", "ls"]  # type: ignore[union-attr]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"path": "é"}  # type: ignore[union-attr]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    assert len(check(managed, server)) == 1


async def test_a_call_in_another_format_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tracked._warn_of_format.cache_clear()
    managed, _ = on("[TOOL_CALLS]ls[ARGS]{}")
    message = await say(managed, [user("Look")], tools=TOOLS)
    assert message.tool_calls is None
    assert "tool_parser= of ExactManagedServer" in caplog.text


async def test_calls_can_be_read_as_the_dicts_that_atroposlib_gives() -> None:
    managed, server = on(tool_call("ls", path="é"), "Two files.")
    message = await say(managed, [user("Look")], tools=TOOLS)
    (call,) = message.tool_calls
    assert call["id"] == call.id == call.get("id")
    assert call["function"]["name"] == call.function.name == "ls"
    assert "type" in call
    assert "index" not in call
    assert call.get("index", 7) == 7
    with pytest.raises(KeyError):
        call["index"]
    assert dict(call) == {"id": call.id, "type": "function", "function": call.function}
    assert call.model_dump() == {"id": call.id, "type": "function", "function": {**call["function"]}}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "a b"}
    await say(managed, [user("Look"), assistant(None, tool_calls=[call]), result], tools=TOOLS)
    assert len(check(managed, server)) == 1, "and what was read so continues the turn"


async def test_tool_choice_none_and_malformed_calls_are_text() -> None:
    malformed = '<tool_call>\n{"name": "ls", "arguments": {\n</tool_call>'
    managed, _ = on(tool_call("ls"), malformed)
    for choice, text in (("none", tool_call("ls")), ("auto", malformed)):
        completion = await managed.chat_completion(messages=[user("Look")], tools=TOOLS, tool_choice=choice)
        assert completion.choices[0].message.tool_calls is None
        assert completion.choices[0].message.content == text
        assert completion.choices[0].finish_reason == "stop"


async def test_unknown_arguments_do_not_reach_the_server() -> None:
    managed, server = on("Hello.")
    await managed.chat_completion(messages=[user("Hi")], tools=TOOLS, tool_choice="auto", response_format={}, user="me")
    assert server.requests[0].sampling.keys() <= {"model", "n", "max_tokens", "stop_token_ids", *NEUTRAL}


class Reasoning(ScriptedServer):
    """Gives a finish reason of its own."""

    reason: Any = None

    async def _tokens_and_logprobs_completion_wrapper(self, **kwargs: Any) -> Any:
        answer = await super()._tokens_and_logprobs_completion_wrapper(**kwargs)
        return *answer[:3], [self.reason]


@pytest.mark.parametrize("reason", ["eviction", None, {"type": "eviction"}])
async def test_an_unusual_finish_reason_is_no_exception(reason: Any) -> None:
    server = Reasoning([Reply("Hello", finish_reason="length")])
    server.reason = reason
    managed = ExactManagedServer(server)
    completion = await managed.chat_completion(messages=[user("Hi")])
    assert completion.choices[0].finish_reason == "length"
    assert len(check(managed, server)) == 1


async def test_an_answer_that_was_cut_off_says_so_though_it_holds_a_call() -> None:
    managed, _ = on(Reply(tool_call("ls") + "\nAnd", finish_reason="length"))
    completion = await managed.chat_completion(messages=[user("Look")], tools=TOOLS)
    assert completion.choices[0].message.tool_calls
    assert completion.choices[0].finish_reason == "length"


@pytest.mark.parametrize("preserve", [False, True])
async def test_sampled_thinking_stays_in_the_tokens(preserve: bool) -> None:
    managed, server = on("<think>\nHm.\n</think>\n\nHello.", "Bye.", preserve_think_blocks=preserve)
    answer = await say(managed, [user("Hi")])
    assert answer.content == "<think>\nHm.\n</think>\n\nHello."
    await say(managed, [user("Hi"), assistant(answer.content), user("And?")])
    (node,) = check(managed, server)
    assert node.full_text.count("<think>\nHm.") == 1


async def test_a_server_without_token_ids_yields_no_tokens() -> None:
    server = OpenAIServer(APIServerConfig(model_name="gpt", base_url="http://127.0.0.1:9/v1", health_check=False))
    managed = ExactManagedServer(server, chatml_tokenizer())
    with pytest.raises(UnsupportedServerError, match="OpenAIServer has no token call"):
        await say(managed, [user("Hi")])
    assert managed.get_state() == {"nodes": []}


# ── The doubles that atroposlib's own tests use ──────────────────────────────────────────────────────────────────────


class Characters:
    """A tokenizer with no more than three methods: each character is a token, 1 begins a text, 2 ends it."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(character) for character in text]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(token) for token in tokens if token > 2 or not skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tokenize: bool = False, add_generation_prompt: bool = True
    ) -> str:
        text = "".join(f"<{message['role']}>{message['content']}</{message['role']}>" for message in messages)
        return text + "<assistant>" * add_generation_prompt


def harness(**answers: Sequence[int]) -> ServerHarness:
    """A server that knows texts as prompts, and what to answer to each."""
    server = ServerHarness()
    server.tokenizer = Characters()
    server.config = SimpleNamespace(model_name="characters")
    for prompt, output_ids in answers.items():
        expect(server, prompt, Characters().encode(prompt), "".join(map(chr, output_ids)))
    return server


def expect(server: ServerHarness, prompt: str, prompt_ids: list[int], *outputs: str) -> None:
    ids = [[ord(character) for character in output] for output in outputs]
    logprobs = [[-0.1] * len(output) for output in outputs]
    server.set_tokens_and_logprobs_response(prompt, prompt_ids, ids, logprobs, ["stop"] * len(outputs))


async def test_a_tokenizer_of_three_methods_and_a_server_that_knows_prompts_as_text() -> None:
    server = harness()
    managed = ExactManagedServer(server)
    encode = Characters().encode
    first = "<user>Hi</user><assistant>"
    expect(server, first, encode(first), "One", "Two")
    group = await managed.chat_completion(messages=[user("Hi")], n=2)
    assert [choice.message.content for choice in group.choices] == ["One", "Two"]
    then = first + "Two</assistant><user>And?</user><assistant>"
    expect(server, then, encode(then), "Three")
    answer = await say(managed, [user("Hi"), assistant("Two"), user("And?")])
    assert answer.content == "Three"
    nodes = managed.get_state()["nodes"]
    assert [node.tokens for node in nodes] == [encode(first + "One"), encode(then + "Three")]
    assert nodes[1].tokens.count(1) == 1
    assert nodes[1].masked_tokens[-5:] == [ord(character) for character in "Three"]


class WithTools(Characters):
    """Its template names the tools, and drops calls."""

    def apply_chat_template(self, messages: Any, *, tools: Any = None, **options: Any) -> str:  # type: ignore[override]
        plain = [{**message, "content": message.get("content") or ""} for message in messages]
        return "".join(f"[{tool['function']['name']}]" for tool in tools or ()) + super().apply_chat_template(
            plain, **options
        )


async def test_the_prompt_as_text_is_what_atroposlibs_proxy_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    server = harness()
    server.tokenizer, server.server_healthy = WithTools(), True
    manager = SimpleNamespace(servers=[server])
    monkeypatch.setattr(managed_server_proxy, "ManagedServer", ExactManagedServer)
    client = TestClient(managed_server_proxy.create_app(manager, server.tokenizer, "characters"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM, which is not there
        session = client.post("/sessions/create", json={}).json()["uuid"]

    def ask(output: str, *messages: Message) -> Message:
        body = {"messages": messages, "tools": TOOLS}
        prompt = client.post(f"/{session}/v1/chat/completions/render", json=body).json()["prompt_text"]
        expect(server, prompt, server.tokenizer.encode(prompt), output)
        answer = client.post(f"/{session}/v1/chat/completions", json=body).json()
        message: Message = answer["choices"][0]["message"]
        return message

    first = ask('<tool_call>{"name": "ls", "arguments": {"path": "."}}</tool_call>', user("Look"))
    result = {"role": "tool", "tool_call_id": first["tool_calls"][0]["id"], "content": "a b"}
    second = ask("Two files.", user("Look"), first, result)
    assert second["content"] == "Two files."
    ask("Bye.", user("Look"), first, result, second, user("Thanks"))
    (node,) = client.get(f"/{session}/nodes").json()["nodes"]
    assert len(node["metadata"]["turns"]) == 3


class Closing(Characters):
    """Its template ends a turn with the token that ends a text."""

    def apply_chat_template(self, messages: Any, tokenize: bool = False, add_generation_prompt: bool = True) -> str:
        text = "".join(f"<{message['role']}>{message['content']}\2" for message in messages)
        return text + "<assistant>" * add_generation_prompt


async def test_such_a_tokenizers_texts_begin_once_and_its_turns_end_once() -> None:
    server = harness()
    managed = ExactManagedServer(server, Closing())
    encode = Closing().encode
    first = "<user>Hi\2<assistant>"
    expect(server, first, encode(first), "One\2")
    answer = await say(managed, [user("Hi")])
    assert answer.content == "One"
    then = first + "One\2<user>And?\2<assistant>"
    expect(server, then, encode(then), "Two\2")
    await say(managed, [user("Hi"), answer, user("And?")])
    expect(server, "Once", encode("Once"), " upon")
    await managed.completion(prompt="Once")
    expect(server, "Once upon a", encode("Once upon a"), " time")
    await managed.completion(prompt="Once upon a")
    chat, text = managed.get_state()["nodes"]
    assert chat.tokens == encode(then + "Two\2")
    assert text.tokens == encode("Once upon a time")
    assert len(turns_of(chat)) == len(turns_of(text)) == 2


async def test_a_text_that_such_a_server_does_not_know() -> None:
    managed = ExactManagedServer(harness(Hello=[33]))
    assert (await managed.completion(prompt="Hello")).choices[0].text == "!"
    with pytest.raises(BackendResponseError, match="not None"):
        await managed.completion(prompt="Goodbye")


async def test_a_server_without_prompt_logprobs_says_so() -> None:
    managed = ExactManagedServer(harness())
    with pytest.raises(NotImplementedError, match="does not implement get_logprobs"):
        await managed.get_logprobs(prompt="Hi")
