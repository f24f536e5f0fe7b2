"""Token ids in, token ids and logprobs out: a backend whose every turn can become training data."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar

from hermes_atropos.backends import ModelTurn
from hermes_atropos.backends.token_calls import Sample, TokenCalls
from hermes_atropos.errors import ContextLengthError, TokenFidelityError
from hermes_atropos.messages import Message, Tool
from hermes_atropos.rendering import Renderer, renderer_for
from hermes_atropos.rendering.tokenizers import decode, template_text, vocab_size
from hermes_atropos.tokens import BreakCause, Ledger, Match, Prompt, Turn
from hermes_atropos.toolcalls import ParsedText

__all__ = ["TrackedBackend"]

logger = logging.getLogger(__name__)

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
        ChatTemplateError: the tokenizer cannot render a conversation.
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
        self._calls = TokenCalls(server, patience_s=patience_s)
        self.tokenizer = tokenizer
        self.renderer = renderer or renderer_for(tokenizer, tool_format=tool_format)
        self.ledger = ledger or self._new_ledger()
        self.context_length = context_length
        self._warned: set[str] = set()

    @property
    def servers(self) -> list[Any]:
        """The servers, one of which takes each call."""
        return self._calls.pool.servers

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
        sampled = await self._calls.sample(ids, text, n, self._parameters(sampling, prompt.length))
        turns: list[Turn] = []
        faults: list[TokenFidelityError] = []
        for sample in sampled:
            try:
                # atroposlib's wrappers hand back the list that they were given, which says nothing of the server.
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
        """The harness will never see these answers, so it can't act on them: they are not training data."""
        for turn in turns:
            self.ledger.discard(turn.ref, reason)

    async def _prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> tuple[Prompt, list[int]]:
        """What asks for the next answer, and its ids."""
        match = self.ledger.locate(messages, tools)
        if match.prompt is not None:
            return match.prompt, self.ledger.ids(match.prompt)
        cause = None
        if match.turn is not None:
            output_ids = list(match.turn.output_ids)
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
        if self.renderer.rewrites(match.history, list(turn.output_ids), match.new_messages, tools):
            return BreakCause.TEMPLATE
        return BreakCause.UNPROVABLE

    async def _parse(self, turn: Turn, tools: Sequence[Tool] | None) -> ParsedText:
        output_ids = list(turn.output_ids)
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
            raw=decode(self.tokenizer, list(turn.output_ids)),
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
        context_length = self.context_length or known_context_length(self.servers, self.tokenizer)
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
