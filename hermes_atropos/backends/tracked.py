"""Token ids in, token ids and logprobs out: a backend whose every turn can become training data."""

from __future__ import annotations

import asyncio
import copy
import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self, TypeVar

from hermes_atropos.backends import ModelTurn
from hermes_atropos.backends.context import length_of
from hermes_atropos.backends.hearing import TokenHearing
from hermes_atropos.backends.token_calls import ABORTS, TokenCalls
from hermes_atropos.errors import BackendResponseError, ContextLengthError, SamplingError, TokenFidelityError
from hermes_atropos.listening import Delta, hearing, text_listener, token_listener
from hermes_atropos.messages import Message, Tool
from hermes_atropos.rendering import Renderer, renderer_for
from hermes_atropos.rendering.tokenizers import decode, template_text
from hermes_atropos.servers.sampling import (
    FORMS,
    NEUTRAL,
    SGLANG,
    VLLM,
    derived_seed,
    distribution,
    settle_grammar,
    skew,
)
from hermes_atropos.tokens import BreakCause, Ledger, Match, Prompt, Turn
from hermes_atropos.toolcalls import ParsedText
from hermes_atropos.toolcalls.formats import format_in

__all__ = ["TrackedBackend"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Longer texts are rendered, and longer answers parsed, off the event loop.
INLINE_CHARS = 4_000
INLINE_TOKENS = 2_000

#: How much of a prompt's end tells whether it opened the model's thinking.
PROMPT_TAIL = 256

# What may be asked of a token call: what some engine's sampler knows. Whether this one does, its server says.
SAMPLING = VLLM | SGLANG | FORMS | {"split", "train_skewed"}
# fmt: off
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
        server: an atroposlib ``ServerManager`` (a healthy server with room takes each call), an
            ``APIServer``, or any object with ``tokens_and_logprobs_completion(**kwargs)``, which is given the prompt as
            text, too.
        tokenizer: the served model's Hugging Face tokenizer.
        renderer: messages to token ids and back; the tokenizer's by default.
        tool_format: how the model writes tool calls; ``auto`` finds out.
        chat_template_kwargs: further arguments of the chat template, such as ``{"enable_thinking": False}``.
        vocab_size: how many ids the served model has, where that is more than the tokenizer knows (a padded embedding).
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
        renderer: Renderer | None = None,
        tool_format: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        context_length: int | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self.server = server
        self._calls = TokenCalls(server, patience_s=patience_s)
        self.tokenizer = tokenizer
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.renderer = renderer or renderer_for(tokenizer, tool_format=tool_format, **self.chat_template_kwargs)
        self._vocab_size = vocab_size or self.renderer.vocab_size
        self.ledger = self._new_ledger()
        self.context_length = context_length
        self._rollouts = itertools.count(1)
        self._rollout, self._asked = 0, itertools.count()

    @property
    def servers(self) -> list[Any]:
        """The servers, one of which takes each call."""
        return self._calls.pool.servers

    def fresh(self) -> Self:
        """The same for another rollout: on the same servers, with an empty ledger."""
        twin = copy.copy(self)
        twin.ledger = self._new_ledger()
        twin._rollout, twin._asked = next(self._rollouts), itertools.count()
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
                ``split="eval"`` takes the servers' evaluation slots; ``extra_body`` is sent as it is. What is not given
                is neutral, whatever the checkpoint's own defaults. ``seed`` is a group's: each rollout's and each
                call's own is derived from it. An answer whose logprobs are not of the distribution that it was sampled
                from (see ``Turn.skew``) is not trained, unless with ``train_skewed=True``.

        Raises:
            SamplingError: a parameter that the server does not know, outside of ``extra_body``.
            ContextLengthError: the prompt leaves no room for an answer.
            BackendError: the call failed for good.
            TokenFidelityError: the answer does not fit what was asked; it is kept in the ledger as a faulty turn.
            ChatTemplateError: the template cannot render the messages.
        """
        answers = await self.answers(messages, tools, n, sampling)
        return [self.model_turn(turn, parsed) for turn, parsed in answers]

    async def preview(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> tuple[str, list[int]]:
        """What ``sample`` would send for these messages: as text, and as ids ``[prompt_len] int``."""
        prompt = await self._prompt(messages, tools)
        return self._text(messages, tools, prompt), self.ledger.ids(prompt)

    async def answers(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, n: int, sampling: Mapping[str, Any]
    ) -> list[tuple[Turn, ParsedText]]:
        """``n`` recorded answers to messages, and what they say. Raises as ``sample_group`` does."""
        prompt = await self._prompt(messages, tools)
        tell = text_listener.get() if n == 1 else None
        heard = None if tell is None else self._hearing(tell, prompt, tools)
        ask = functools.partial(self.ask, prompt, sampling=sampling, text=lambda: self._text(messages, tools, prompt))
        answers: list[tuple[Turn, ParsedText]] = []
        with hearing(token_listener, heard):
            turns = await ask(n)
            try:
                for place, turn in enumerate(turns):
                    parsed = await self._parse(turn, tools)
                    if tools and self._broken_by_an_abort(turn, parsed):
                        self._forsake([turn], "the server aborted it, and what it went on with made no valid call")
                        [turns[place]] = [turn] = await ask(1)
                        parsed = await self._parse(turn, tools)
                    if tools and not parsed.calls:
                        raw = decode(self.tokenizer, turn.output_ids)
                        await warn_of_another_format(raw, self.renderer.tool_format, tools)
                    answers.append((turn, parsed))
                if heard is not None:
                    heard.end(answers[0][1])
            except BaseException as error:
                self._forsake(turns, f"its answer was never read: {error!r}")
                raise
        return answers

    async def ask(self, prompt: Prompt, n: int, sampling: Mapping[str, Any], text: Callable[[], str]) -> list[Turn]:
        """``n`` recorded answers to a prompt of the ledger.

        Args:
            text: the prompt as text, for servers that want that too.

        Raises:
            BackendError, TokenFidelityError: as ``sample_group`` does.
        """

        def told(kept: list[int]) -> str:
            return text() + decode(self.tokenizer, kept) if kept else text()

        ids = self.ledger.ids(prompt)
        parameters = self._parameters(sampling, prompt.length)
        sampled = await self._calls.sample(ids, told, n, parameters, family(prompt))
        shaping = distribution(parameters)
        turns: list[Turn] = []
        faults: list[TokenFidelityError] = []
        for sample in sampled:
            try:
                # atroposlib's wrappers hand back the list that they were given, which says nothing of the server.
                echo = None if sample.echo is ids and len(ids) == prompt.length else sample.echo
                skewed = skew(shaping, sample.scaled)
                turn = self.ledger.record(
                    prompt,
                    sample.output_ids,
                    sample.logprobs,
                    sample.finish_reason,
                    echo=echo,
                    metadata=sample.metadata,
                    weights=sample.weights,
                    sampling=shaping,
                    skew=skewed,
                    barred=skewed is not None and not sampling.get("train_skewed"),
                )
                turns.append(turn)
            except TokenFidelityError as fault:
                faults.append(fault)
        if faults:
            self._forsake(turns, "another answer to the same request was refused")
            raise faults[0]
        if any(turn.finish_reason == "abort" for turn in turns):
            self._forsake(turns, "the server aborted it, and again whenever it was gone on with")
            raise BackendResponseError(
                f"{sampled[0].metadata['server_url']} aborted an answer, and {ABORTS} times in a row before it said "
                "anything more",
                url=sampled[0].metadata["server_url"],
            )
        return turns

    def _broken_by_an_abort(self, turn: Turn, parsed: ParsedText) -> bool:
        """Whether a call is malformed in an answer of several parts: the model may hear of no fault but its own."""
        joined = bool(turn.metadata.get("aborts")) and self.finish_reason(turn) != "length"
        return joined and not all(call.ok for call in parsed.calls)

    def _hearing(self, tell: Callable[[Delta], object], prompt: Prompt, tools: Sequence[Tool] | None) -> TokenHearing:
        tail = self.ledger.tail(prompt, PROMPT_TAIL)
        return TokenHearing(tell, tools, lambda ids: self.renderer.parse(ids, tools, tail), prompt.length)

    def _new_ledger(self) -> Ledger:
        return Ledger(vocab_size=self._vocab_size, boundaries=self.renderer.stop_token_ids)

    def _forsake(self, turns: list[Turn], reason: str) -> None:
        """The harness will never see these answers, so it can't act on them: they are not training data."""
        for turn in turns:
            self.ledger.discard(turn.ref, reason)

    async def _prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> Prompt:
        """What asks for the next answer."""
        match = self.ledger.locate(messages, tools)
        if match.prompt is not None:
            return match.prompt
        cause = None
        if match.turn is not None:
            output_ids = list(match.turn.output_ids)
            bridge = await off_loop(
                characters(match.new_messages) > INLINE_CHARS,
                lambda: self.renderer.bridge(match.history, output_ids, match.new_messages, tools),
            )
            if not isinstance(bridge, BreakCause):
                return self.ledger.prompt(match, bridge)
            cause = self._break_cause(match, match.turn, bridge)
        long = tools is not None or characters(messages) > INLINE_CHARS
        ids = await off_loop(long, lambda: self.renderer.render(messages, tools))
        return self.ledger.prompt(match, ids, cause)

    def _text(self, messages: Sequence[Message], tools: Sequence[Tool] | None, prompt: Prompt) -> str:
        return template_text(self.tokenizer, self._as_sampled(messages, prompt), tools, **self.chat_template_kwargs)

    def _as_sampled(self, messages: Sequence[Message], prompt: Prompt) -> list[Message]:
        """The messages of a prompt, those answers in them that it continues as they were sampled, calls included."""
        told = list(messages)
        place, turn = len(told) - prompt.added, prompt.parent if prompt.cause is None else None
        while turn is not None:
            place -= 1
            text = decode(self.tokenizer, turn.output_ids, skip_special_tokens=True)
            told[place] = {"role": "assistant", "content": text}
            place, turn = place - turn.prompt.added, turn.before
        return told

    def _break_cause(self, match: Match, turn: Turn, told: BreakCause) -> BreakCause:
        """Why the messages could not be appended to the turn that they continue; ``told`` is what the renderer says."""
        if match.rewritten:
            return BreakCause.HISTORY_REWRITTEN
        if self.finish_reason(turn) == "length":
            return BreakCause.TRUNCATED
        return told

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

    def model_turn(self, turn: Turn, parsed: ParsedText) -> ModelTurn:
        """A recorded answer that says this."""
        return ModelTurn(
            content=parsed.content,
            reasoning=parsed.reasoning,
            calls=parsed.calls,
            finish_reason=self.finish_reason(turn),
            ref=turn.ref,
            prompt_tokens=turn.prompt.length,
            completion_tokens=len(turn.output_ids),
            cached_tokens=turn.before.end if turn.before else 0,
            raw=decode(self.tokenizer, turn.output_ids),
        )

    def finish_reason(self, turn: Turn) -> Literal["stop", "length"]:
        """What the server said; where it said something else, whether the turn has an end says it."""
        ended = len(turn.output_ids) > 0 and turn.output_ids[-1] in self.renderer.stop_token_ids
        return "stop" if turn.finish_reason == "stop" or (ended and turn.finish_reason != "length") else "length"

    def _parameters(self, sampling: Mapping[str, Any], prompt_length: int) -> dict[str, Any]:
        """What is sent to the server beside the prompt."""
        wanted = {key: value for key, value in sampling.items() if value is not None}
        extra = wanted.pop("extra_body", {})
        for name in ("max_new_tokens", "max_completion_tokens"):
            if name in wanted:
                wanted.setdefault("max_tokens", wanted.pop(name))
        if "chat_template_kwargs" in wanted or "chat_template_kwargs" in extra:
            raise SamplingError(
                "the prompt is rendered here, not by the server: give chat_template_kwargs= where the agent or the "
                "managed server is constructed"
            )
        if strange := sorted(name for name in wanted if name not in SAMPLING and name not in CHAT_ONLY):
            raise SamplingError(
                f"no token server knows {', '.join(strange)}: leave it out, or pass what yours knows in extra_body"
            )
        wanted.pop("train_skewed", None)
        if "seed" in wanted:
            wanted["seed"] = derived_seed(wanted["seed"], self._rollout, next(self._asked))
        settle_grammar(wanted)
        parameters = NEUTRAL | {key: value for key, value in wanted.items() if key in SAMPLING}
        if extra:
            parameters["extra_body"] = extra
        if self.renderer.stop_token_ids:
            parameters.setdefault("stop_token_ids", sorted(self.renderer.stop_token_ids))
        context_length = self.context_length or known_context_length(self.servers, self.tokenizer)
        if context_length is not None:
            left = context_length - prompt_length - max(map(reserved, self.servers))
            if left < 1:
                raise ContextLengthError(
                    f"the prompt has {prompt_length} tokens, the context {context_length}: shorten the conversation, "
                    "or set context_length if the server has more",
                    attempts=0,
                )
            parameters["max_tokens"] = min(parameters.get("max_tokens", left), left)
        return parameters


def family(prompt: Prompt) -> int:
    """What prompts have in common that begin alike: those of a conversation, and of a group's rollouts."""
    while prompt.parent is not None:
        prompt = prompt.parent.prompt
    return hash(prompt.pieces)


async def off_loop(long: bool, work: Callable[[], T]) -> T:
    """The work's result; done on another thread if it is long."""
    return await asyncio.to_thread(work) if long else work()


async def warn_of_another_format(raw: str, read: str, tools: Sequence[Tool]) -> None:
    """Say it, once, if an answer without calls holds one in a format that is not read."""
    other = await off_loop(len(raw) > INLINE_CHARS, lambda: format_in(raw, tools))
    if other is not None and other != read:
        _warn_of_format(other, read)


@functools.cache
def _warn_of_format(other: str, read: str) -> None:
    logger.warning(
        "An answer holds a tool call in the format %r, and calls are read in the format %r: it was not run. If the "
        "model writes calls so, pass tool_format=%r (tool_parser= of ExactManagedServer). This is said once.",
        other,
        read,
        other,
    )


def characters(messages: Sequence[Message]) -> int:
    """About how much text there is to render."""
    parts = (message.get(key) or "" for message in messages for key in ("content", "reasoning_content", "tool_calls"))
    return sum(len(part if isinstance(part, str) else str(part)) for part in parts)


def reserved(server: Any) -> int:
    """Tokens of the context that a server leaves free: one in SGLang, also through atroposlib's class for it."""
    from atroposlib.envs.server_handling.sglang_server import SGLangServer

    return int(getattr(server, "reserved", isinstance(server, SGLangServer)))


def known_context_length(servers: Sequence[Any], tokenizer: Any) -> int | None:
    """The smallest that servers tell of themselves; of servers that never do, the tokenizer's; None if unknown."""
    telling = [server.context_length for server in servers if hasattr(server, "context_length")]
    if telling:
        return min((length for length in telling if length is not None), default=None)
    return length_of(tokenizer)
