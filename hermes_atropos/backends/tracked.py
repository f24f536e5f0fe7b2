"""Token ids in, token ids and logprobs out: a backend whose every turn can become training data."""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar
from weakref import WeakKeyDictionary

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage, ChatCompletionMessageToolCall
from openai.types.chat.chat_completion import Choice

from hermes_atropos.backends import ModelTurn
from hermes_atropos.backends.calls import Sample, TokenServers
from hermes_atropos.errors import ChatTemplateError, ContextLengthError, NoTokenizerError, TokenFidelityError
from hermes_atropos.ledger import TURN_KEY, BreakCause, Ledger, Match, Prompt, Turn
from hermes_atropos.ledger import Sequence as Stream
from hermes_atropos.rendering import Renderer, renderer_for
from hermes_atropos.toolcalls import ParsedText, ParseStatus, ToolCall, parse_text

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.managed_server import SequenceNode

__all__ = ["ExactManagedServer", "TrackedBackend"]

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
Tool = Mapping[str, Any]
T = TypeVar("T")

#: Longer texts are rendered, and longer answers parsed, off the event loop.
INLINE_CHARS = 4_000
INLINE_TOKENS = 2_000

#: How much of a prompt's end tells whether it opened the model's thinking.
PROMPT_TAIL = 256

# What vLLM's and SGLang's samplers know. Anything else may be refused by one of them, or means another kind of call.
# fmt: off
SAMPLING = {
    "bad_words", "ebnf", "frequency_penalty", "guided_decoding", "ignore_eos", "json_schema", "logit_bias",
    "max_tokens", "min_p", "min_tokens", "presence_penalty", "regex", "repetition_penalty", "seed", "split", "stop",
    "stop_token_ids", "structural_tag", "structured_outputs", "temperature", "top_k", "top_p",
}
# What belongs to chat endpoints, and says nothing about how tokens are sampled.
CHAT_ONLY = {
    "extra_headers", "extra_query", "input_ids", "logprobs", "messages", "metadata", "model", "n",
    "parallel_tool_calls", "prompt", "service_tier", "skip_reasoning", "store", "stream", "stream_options", "timeout",
    "tool_choice", "tools", "top_logprobs", "user",
}
# fmt: on


class TrackedBackend:
    """Answers through the token call of atroposlib servers, and keeps what was sent and sampled in a ledger.

    Args:
        server: an atroposlib ``ServerManager`` (the healthy server with the most room takes each call), an
            ``APIServer``, or any object with ``tokens_and_logprobs_completion(**kwargs)``.
        tokenizer: the served model's Hugging Face tokenizer.
        ledger: where turns are kept; a new one by default.
        renderer: messages to token ids and back; the tokenizer's by default.
        tool_format: how the model writes tool calls; ``auto`` finds out.
        context_length: tokens that prompt and answer may have together. By default what the server says, else the
            tokenizer's ``model_max_length``, else no limit.
        patience_s: seconds for which a failing call is retried, and for which a healthy server is waited for.

    Raises:
        NoServerError, UnsupportedServerError: no server, or one without a token call.
        NoTokenizerError, ChatTemplateError: the tokenizer cannot render a conversation.
    """

    tracks_tokens = True

    def __init__(
        self,
        server: Any,
        tokenizer: Any,
        *,
        ledger: Ledger | None = None,
        renderer: Renderer | None = None,
        tool_format: str = "auto",
        context_length: int | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self.server = server
        self.servers = TokenServers(server, patience_s=patience_s)
        self.tokenizer = tokenizer
        self.renderer = renderer or renderer_for(tokenizer, tool_format=tool_format)
        self.ledger = ledger or self._new_ledger()
        self.context_length = context_length
        self._warned: set[str] = set()

    def fresh(self) -> Self:
        """The same for another rollout: on the same servers, with an empty ledger."""
        twin = copy.copy(self)
        twin.ledger = self._new_ledger()
        return twin

    async def sample(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, **sampling: Any
    ) -> ModelTurn:
        """Ask for one answer; see ``sample_group``."""
        return (await self.sample_group(messages, tools, **{**sampling, "n": 1}))[0]

    async def sample_group(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, *, n: int = 1, **sampling: Any
    ) -> list[ModelTurn]:
        """Ask for ``n`` answers to the same prompt.

        Args:
            messages: OpenAI messages. Where they continue a recorded turn, the prompt is that turn's very tokens and
                the rendering of what is new; see ``Ledger.locate``.
            tools: OpenAI tool definitions.
            n: how many answers; they are siblings in the ledger.
            sampling: ``temperature``, ``max_tokens`` (cut to what the context leaves), ``stop``, …;
                ``split="eval"`` takes the servers' evaluation slots; ``extra_body`` is sent as it is.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
            BackendError: the call failed for good.
            TokenFidelityError: the answer does not fit what was asked; it is kept in the ledger as a faulty turn.
            ChatTemplateError: the template cannot render the messages.
        """
        answers = await self.answers(messages, tools, n, sampling)
        return [self._model_turn(turn, parsed) for turn, parsed in answers]

    async def answers(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, n: int, sampling: Mapping[str, Any]
    ) -> list[tuple[Turn, ParsedText]]:
        """``n`` recorded answers to messages, and what they say. Raises as ``sample_group`` does."""
        prompt, ids = await self._prompt(messages, tools)
        turns = await self.ask(prompt, ids, n, sampling, lambda: template_text(self.tokenizer, messages, tools))
        try:
            return [(turn, await self._parse(turn, tools)) for turn in turns]
        except BaseException as error:
            self._forsake(turns, f"its answer was never read: {error!r}")
            raise

    async def ask(
        self, prompt: Prompt, ids: list[int], n: int, sampling: Mapping[str, Any], text: Callable[[], str]
    ) -> list[Turn]:
        """``n`` recorded answers to a prompt of the ledger.

        Args:
            ids: the prompt's.
            text: the prompt as text, for servers that want that too.

        Raises:
            BackendError, TokenFidelityError: as ``sample_group`` does.
        """
        sampled = await self.servers.sample(ids, text, n, self._parameters(sampling, prompt.length))
        turns: list[Turn] = []
        faults: list[TokenFidelityError] = []
        for sample in sampled:
            try:
                # The wrappers of atroposlib hand back the list that they were given, which is no word of the server's.
                echo = None if sample.echo is ids and len(ids) == prompt.length else sample.echo
                turns.append(self._record(prompt, sample, echo))
            except TokenFidelityError as fault:
                faults.append(fault)
        if faults:
            self._forsake(turns, "another answer to the same request was refused")
            raise faults[0]
        return turns

    def _new_ledger(self) -> Ledger:
        return Ledger(vocab_size=vocab_size(self.tokenizer), boundaries=self.renderer.stop_token_ids)

    def _record(self, prompt: Prompt, sample: Sample, echo: Sequence[int] | None) -> Turn:
        return self.ledger.record(
            prompt, sample.output_ids, sample.logprobs, sample.finish_reason, echo=echo, metadata=sample.metadata
        )

    def _forsake(self, turns: list[Turn], reason: str) -> None:
        """The harness will never see these answers, so it can't act on them: they are no training data."""
        for turn in turns:
            self.ledger.discard(turn.ref, reason)

    async def _prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> tuple[Prompt, list[int]]:
        """What asks for the next answer, and its ids."""
        match = self.ledger.locate(messages, tools)
        if match.prompt is not None:
            return match.prompt, self.ledger.ids(match.prompt)
        cause = None
        if match.turn is not None:
            output_ids = match.turn.output_ids.tolist()
            delta = await off_loop(
                characters(match.new_messages) > INLINE_CHARS,
                lambda: self.renderer.bridge(match.history, output_ids, match.new_messages, tools),
            )
            if delta is not None:
                prompt = self.ledger.prompt(match, delta)
                return prompt, self.ledger.ids(prompt)
            cause = self._break_cause(match, match.turn, tools)
        long = tools is not None or characters(messages) > INLINE_CHARS
        ids = await off_loop(long, lambda: self.renderer.render(messages, tools))
        return self.ledger.prompt(match, ids, cause), ids

    def _break_cause(self, match: Match, turn: Turn, tools: Sequence[Tool] | None) -> BreakCause:
        """Why the messages could not be appended to the turn that they continue."""
        if match.rewritten:
            return BreakCause.HISTORY_REWRITTEN
        if self.finish_reason(turn) == "length":
            return BreakCause.TRUNCATED
        rewrites = getattr(self.renderer, "rewrites", None)
        if rewrites and rewrites(match.history, turn.output_ids.tolist(), match.new_messages, tools):
            return BreakCause.TEMPLATE
        return BreakCause.UNPROVABLE

    async def _parse(self, turn: Turn, tools: Sequence[Tool] | None) -> ParsedText:
        output_ids = turn.output_ids.tolist()
        prompt_tail = self.ledger.tail(turn.prompt, PROMPT_TAIL)
        parsed = await off_loop(
            len(output_ids) > INLINE_TOKENS, lambda: self.renderer.parse(output_ids, tools, prompt_tail)
        )
        message: dict[str, Any] = {"role": "assistant", "content": parsed.content}
        if parsed.calls:
            message["tool_calls"] = [call.to_openai() for call in parsed.calls]
        self.ledger.answered(turn, message)
        return parsed

    def _model_turn(self, turn: Turn, parsed: ParsedText) -> ModelTurn:
        return ModelTurn(
            content=parsed.content,
            reasoning=parsed.reasoning,
            calls=parsed.calls,
            finish_reason=self.finish_reason(turn),
            ref=turn.ref,
            prompt_tokens=turn.prompt.length,
            completion_tokens=len(turn.output_ids),
            raw=decode(self.tokenizer, turn.output_ids.tolist()),
        )

    def finish_reason(self, turn: Turn) -> Literal["stop", "length"]:
        """What the server said; where it said nothing or aborted, whether the turn has an end says it."""
        ended = len(turn.output_ids) > 0 and turn.output_ids[-1] in self.renderer.stop_token_ids
        return "stop" if turn.finish_reason == "stop" or (ended and turn.finish_reason != "length") else "length"

    def _parameters(self, sampling: Mapping[str, Any], prompt_length: int) -> dict[str, Any]:
        """What is sent to the server beside the prompt."""
        wanted = {key: value for key, value in sampling.items() if value is not None}
        extra = wanted.pop("extra_body", {})
        for name in ("max_new_tokens", "max_completion_tokens"):
            if name in wanted:
                wanted.setdefault("max_tokens", wanted.pop(name))
        unknown = wanted.keys() - SAMPLING - CHAT_ONLY - self._warned
        if unknown:
            logger.warning("not sent, as token servers do not know it (extra_body sends anything): %s", sorted(unknown))
            self._warned |= unknown
        parameters = {key: value for key, value in wanted.items() if key in SAMPLING} | extra
        if self.renderer.stop_token_ids:
            parameters.setdefault("stop_token_ids", sorted(self.renderer.stop_token_ids))
        context_length = self.context_length or known_context_length(self.servers.all, self.tokenizer)
        if context_length is not None:
            left = context_length - prompt_length
            if left < 1:
                raise ContextLengthError(
                    f"the prompt has {prompt_length} tokens, the context {context_length}: shorten the conversation, "
                    "or set context_length if the server has more",
                    attempts=0,
                )
            parameters["max_tokens"] = min(parameters.get("max_tokens", left), left)
        return parameters


async def off_loop(long: bool, work: Callable[[], T]) -> T:
    """The work's result; done on another thread if it is long."""
    return await asyncio.to_thread(work) if long else work()


def characters(messages: Sequence[Message]) -> int:
    """About how much text there is to render."""
    parts = (message.get(key) or "" for message in messages for key in ("content", "reasoning_content", "tool_calls"))
    return sum(len(part if isinstance(part, str) else str(part)) for part in parts)


def known_context_length(servers: Sequence[Any], tokenizer: Any) -> int | None:
    """The smallest that servers tell of themselves; of servers that never do, the tokenizer's; None if unknown."""
    telling = [server.context_length for server in servers if hasattr(server, "context_length")]
    if telling:
        return min((length for length in telling if length is not None), default=None)
    length = getattr(tokenizer, "model_max_length", None)
    # Hugging Face's word for "unknown" is 10**30.
    return length if isinstance(length, int) and 0 < length < 10**8 else None


_VOCAB_SIZES: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


def vocab_size(tokenizer: Any) -> int | None:
    """One more than the tokenizer's largest id; None where it doesn't tell."""
    if not (hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "__len__")):
        return None
    if tokenizer not in _VOCAB_SIZES:
        _VOCAB_SIZES[tokenizer] = max(tokenizer.get_vocab().values()) + 1
    return _VOCAB_SIZES[tokenizer]


#: Which of our formats a vLLM tool parser reads, where the names differ.
TOOL_PARSERS = {
    "deepseek_v3": "deepseek",
    "deepseek_v31": "deepseek",
    "glm45": "glm",
    "glm47": "glm",
    "kimi_k2": "kimi",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "openai": "gpt_oss",
    "qwen3_xml": "qwen3_coder",
}


class ExactManagedServer:
    """A drop-in for atroposlib's ``ManagedServer`` whose nodes hold exactly what was sent and sampled.

    Answers that come back in ``messages`` are recognised by what they say or, where the answer's own message (or its
    ``model_dump()``) comes back, by the ``TURN_KEY`` that it carries. The turn that they stand for goes into the next
    prompt as it was sampled, and is never rendered again. The same key finds an answer's node: it is the last ``ref``
    of ``node.metadata["turns"]``.

    Args:
        server: what ``TrackedBackend`` takes.
        tokenizer: the served model's; by default the server's, else the one that its configuration names. One that has
            no chat template but ``encode`` and ``decode`` will do for ``completion``.
        track_tree: give ``get_state`` one node a turn, trained on that turn alone, instead of one a sequence.
        tool_parser: how the model writes tool calls, by the name of vLLM's parser or one of ``toolcalls.FORMATS``; by
            default it is found out. Tools are rendered and calls are parsed with and without it.
        preserve_think_blocks: accepted, as atroposlib's has it; thinking that was sampled stays in the tokens anyway.
        context_length, patience_s: as in ``TrackedBackend``.

    Raises:
        NoTokenizerError: no tokenizer given, known or loadable.
        NoServerError, UnsupportedServerError: as ``TrackedBackend`` does.
    """

    def __init__(
        self,
        server: Any,
        tokenizer: Any = None,
        track_tree: bool = False,
        tool_parser: str | None = None,
        preserve_think_blocks: bool = False,
        *,
        context_length: int | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self.server = server
        self.tokenizer = tokenizer or own_tokenizer(getattr(server, "servers", [server])[0])
        self.track_tree = track_tree
        tool_format = TOOL_PARSERS.get(tool_parser or "auto", tool_parser or "auto")
        plain = not getattr(self.tokenizer, "chat_template", None)
        self.backend = TrackedBackend(
            server,
            self.tokenizer,
            renderer=PlainRenderer(self.tokenizer, tool_format) if plain else None,
            tool_format=tool_format,
            context_length=context_length,
            patience_s=patience_s,
        )
        self.reset()

    @property
    def ledger(self) -> Ledger:
        """Every turn so far; ``report()`` says what became of the tokens."""
        return self.backend.ledger

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """Ask for ``n`` answers to ``messages``, with ``tools`` and any sampling parameters.

        Returns:
            A completion whose content is what was sampled without special tokens, up to the first well-formed tool
            call. ``finish_reason`` is ``tool_calls`` if there are such calls, unless the answer was cut off.

        Raises:
            As ``TrackedBackend.sample_group``.
        """
        messages = [as_mapping(message) for message in kwargs.pop("messages", [])]
        tools = kwargs.pop("tools", None)
        choice = kwargs.pop("tool_choice", None)
        answers = await self.backend.answers(messages, tools, kwargs.pop("n", None) or 1, kwargs)
        turns = [turn for turn, _ in answers]
        callable_tools = bool(tools) and choice != "none"
        return ChatCompletion(
            id=f"chatcmpl-{turns[0].ref}",
            created=int(time.time()),
            model=self._model,
            object="chat.completion",
            choices=[
                self._choice(index, turn, parsed.calls if callable_tools else [])
                for index, (turn, parsed) in enumerate(answers)
            ],
            usage=usage(turns),
        )

    async def completion(self, **kwargs: Any) -> Completion:
        """Ask for ``n`` continuations of the text ``prompt``, with any sampling parameters.

        A prompt that begins with a former prompt and what followed it, special tokens included, continues those very
        tokens; only what is new is encoded. Any other prompt is encoded as a whole.

        Raises:
            As ``TrackedBackend.sample_group``.
        """
        text = kwargs.pop("prompt", "")
        prompt = await self._text_prompt(text)
        ids = self.ledger.ids(prompt)
        turns = await self.backend.ask(prompt, ids, kwargs.pop("n", None) or 1, kwargs, lambda: text)
        choices = [
            CompletionChoice(index=index, text=self._text(turn), finish_reason=self.backend.finish_reason(turn))
            for index, turn in enumerate(turns)
        ]
        return Completion(
            id=f"cmpl-{turns[0].ref}",
            created=int(time.time()),
            model=self._model,
            object="text_completion",
            choices=choices,
            usage=usage(turns),
        )

    def get_state(self) -> dict[str, Any]:
        """What was sent and sampled, as atroposlib ``SequenceNode``s.

        Returns:
            ``{"nodes": [node]}``, one a sequence; with ``track_tree`` one a turn, by its full text, under both
            ``"sequences"`` and ``"tree"``. A node's ``tokens``, ``masked_tokens`` (-100 where not trained) and
            ``logprobs`` (1.0 there) are [seq_len]; each sampled token is trained in one node. ``metadata`` has the
            last turn's ``finish_reason``, and ``turns``: the ``ref``, ``start`` and ``end`` of each turn's tokens.
        """
        if not self.track_tree:
            return {"nodes": [self._node(sequence) for sequence in self.ledger.sequences()]}
        sequences = self.sequences
        return {"sequences": sequences, "tree": dict(sequences)}

    @property
    def current_nodes(self) -> list[SequenceNode]:
        """The nodes of ``get_state`` without ``track_tree``."""
        return [self._node(sequence) for sequence in self.ledger.sequences()]

    @property
    def sequences(self) -> dict[str, SequenceNode]:
        """The nodes of ``get_state`` with ``track_tree``. Of turns with the same text, the later have their ``ref`` in
        the key as well."""
        nodes: dict[str, SequenceNode] = {}
        for sequence in self.ledger.turn_sequences():
            node = self._node(sequence)
            nodes[node.full_text if node.full_text not in nodes else f"{node.full_text}#{sequence.turns[-1]}"] = node
        return nodes

    def reset(self) -> None:
        """Forget every turn."""
        self.backend = self.backend.fresh()
        self._appended: dict[Prompt, str] = {}
        self._said: dict[Turn, str] = {}

    async def get_logprobs(self, **kwargs: Any) -> dict[str, Any]:
        """Logprobs of a prompt, from the server: of ``messages``, a text ``prompt`` or ``input_ids``.

        Returns:
            ``prompt_tokens`` [prompt_len], ``prompt_topk_token_ids`` and ``prompt_topk_logprobs`` [prompt_len][k].

        Raises:
            NotImplementedError: the server has no such call.
        """
        if not hasattr(self.server, "get_logprobs"):
            raise NotImplementedError(f"{type(self.server).__name__} does not implement get_logprobs")
        if (messages := kwargs.pop("messages", None)) is not None:
            kwargs["prompt"] = self._convert_messages_to_prompt(messages)
        found: dict[str, Any] = await self.server.get_logprobs(**kwargs)
        return found

    def _convert_messages_to_prompt(self, messages: Sequence[Any], tools: Sequence[Tool] | None = None) -> str:
        """The messages as text; atroposlib's name for it, which its users call."""
        plain = [as_mapping(message) for message in messages]
        open_turn = not plain or plain[-1].get("role") != "assistant"
        return template_text(self.tokenizer, plain, tools, open_turn)

    @property
    def _model(self) -> str:
        return str(getattr(getattr(self.backend.servers.all[0], "config", None), "model_name", "unknown"))

    def _text(self, turn: Turn) -> str:
        return decode(self.tokenizer, turn.output_ids.tolist(), skip_special_tokens=True)

    def _choice(self, index: int, turn: Turn, attempts: Sequence[ToolCall]) -> Choice:
        text = self._text(turn)
        calls = [call for call in attempts if call.status is ParseStatus.OK]
        message = ChatCompletionMessage(
            role="assistant",
            content=text.partition(calls[0].raw)[0].strip() or None if calls else text,
            tool_calls=[ChatCompletionMessageToolCall.model_validate(call.to_openai()) for call in calls] or None,
        )
        self.ledger.answered(turn, message.model_dump(exclude_none=True), {"role": "assistant", "content": text})
        setattr(message, TURN_KEY, turn.ref)
        reason = self.backend.finish_reason(turn)
        return Choice(
            index=index, message=message, finish_reason="tool_calls" if calls and reason == "stop" else reason
        )

    def _node(self, sequence: Stream) -> SequenceNode:
        from atroposlib.envs.server_handling.managed_server import SequenceNode

        # Not validated: these long lists are what they should be, and checking them takes longer than all else.
        return SequenceNode.model_construct(
            full_text=self.backend.renderer.decode(sequence.tokens),
            tokens=sequence.tokens,
            masked_tokens=sequence.masks,
            logprobs=sequence.logprobs,
            metadata={
                "finish_reason": self.backend.finish_reason(self.ledger.turn(sequence.turns[-1])),
                "turns": [
                    {"ref": ref, "start": start, "end": end}
                    for ref, (start, end) in zip(sequence.turns, sequence.spans, strict=True)
                ],
            },
        )

    async def _text_prompt(self, text: str) -> Prompt:
        """The recorded prompt of that very text, or a new one that continues the longest recorded stream it can."""
        best: Turn | None = None
        end = 0
        open_prompts = [(prompt, 0) for prompt in self._appended if prompt.parent is None]
        while open_prompts:
            prompt, start = open_prompts.pop()
            appended = self._appended[prompt]
            if not text.startswith(appended, start):
                continue
            stop = start + len(appended)
            if stop == len(text):
                return prompt
            for turn in self.ledger.answers(prompt):
                answer = self._said.setdefault(turn, self.backend.renderer.decode(turn.output_ids))
                if text.startswith(answer, stop):
                    if stop + len(answer) >= end:
                        best, end = turn, stop + len(answer)
                    open_prompts.extend((child, stop + len(answer)) for child in self.ledger.prompts(turn))
        new = text[end:]
        ids = await off_loop(
            len(new) > INLINE_CHARS, lambda: list(self.tokenizer.encode(new, add_special_tokens=best is None))
        )
        prompt = self.ledger.prompt(Match(best, [], [], None if best else BreakCause.FIRST, False, None, None), ids)
        self._appended[prompt] = new
        return prompt


class PlainRenderer:
    """For a tokenizer that has no template to look into: only ``encode``, ``decode`` and ``apply_chat_template``.

    What closes a turn, and what follows it, is read off a conversation that the template renders.
    """

    def __init__(self, tokenizer: Any, tool_format: str = "auto") -> None:
        self.tokenizer = tokenizer
        self.tool_format = "hermes" if tool_format == "auto" else tool_format
        end = getattr(tokenizer, "eos_token_id", None)
        self.stop_token_ids: frozenset[int] = frozenset() if end is None else frozenset({int(end)})

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        return list(self.tokenizer.encode(template_text(self.tokenizer, messages, tools)))

    def bridge(
        self,
        history: Sequence[Message],
        turn_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
    ) -> list[int] | None:
        answer = "the-answer-that-was-sampled"
        before = [*history[:-1], {"role": "assistant", "content": answer}]
        text = template_text(self.tokenizer, [*before, *new_messages], tools)
        start, found, appended = text.partition(answer)
        if not (new_messages and found and start == template_text(self.tokenizer, history[:-1], tools)):
            return None
        ids = list(self.tokenizer.encode(appended, add_special_tokens=False))
        closed = bool(ids and turn_ids) and ids[0] == turn_ids[-1] and ids[0] in self.stop_token_ids
        return ids[1:] if closed else ids

    def parse(
        self,
        output_ids: Sequence[int],
        tools: Sequence[Tool] | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> ParsedText:
        text = str(self.tokenizer.decode(list(output_ids), skip_special_tokens=True))
        return parse_text(text, format=self.tool_format)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


def template_text(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] | None = None, open_turn: bool = True
) -> str:
    """The messages as the tokenizer's chat template writes them.

    Raises:
        ChatTemplateError: it has none, or it refuses the messages.
    """
    plain = [{key: value for key, value in message.items() if key != TURN_KEY} for message in messages]
    # A template that knows no tools may not even have the argument.
    given = {"tools": list(tools)} if tools else {}
    try:
        return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=open_turn, **given))
    except Exception as error:
        raise ChatTemplateError(f"the tokenizer's chat template can't render the messages: {error}") from error


def own_tokenizer(server: Any) -> Any:
    """The tokenizer that a server has, or names in its configuration.

    Raises:
        NoTokenizerError: neither, or it can't be loaded.
    """
    from hermes_atropos.backends.resolve import load_tokenizer

    tokenizer = getattr(server, "tokenizer", None)
    if tokenizer is not None:
        return tokenizer
    config = getattr(server, "config", None)
    names = [getattr(config, name, None) for name in ("tokenizer_name", "model_name")]
    named = next((name for name in names if name not in (None, "none", "default")), None)
    if named is None:
        raise NoTokenizerError(f"{type(server).__name__} has no tokenizer and names none: pass tokenizer=")
    return load_tokenizer(named)


def decode(tokenizer: Any, ids: list[int], *, skip_special_tokens: bool = False) -> str:
    """The ids' text; past the wrapper of a fast Hugging Face tokenizer, which is slower and may "clean up" spaces."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return str(inner.decode(ids, skip_special_tokens=skip_special_tokens))


def as_mapping(message: Any) -> Message:
    """A message as it may be appended by a caller: a dict, or the object of a former answer."""
    return (
        message
        if type(message) is dict or isinstance(message, Mapping)
        else dict(message.model_dump(exclude_none=True))
    )


def usage(turns: Sequence[Turn]) -> CompletionUsage:
    prompt_tokens, completion_tokens = turns[0].prompt.length, sum(len(turn.output_ids) for turn in turns)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
