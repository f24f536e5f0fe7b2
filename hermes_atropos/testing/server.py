"""A model that says what it is told: an atroposlib ``APIServer`` with scripted replies, latency and faults."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig
from openai.types.chat.chat_completion import ChatCompletion
from openai.types.completion import Completion

from hermes_atropos.messages import tool_call_block
from hermes_atropos.rendering.tokenizers import decode
from hermes_atropos.testing.tokenizer import chatml_tokenizer

__all__ = ["Reply", "ScriptedRequest", "ScriptedServer", "tool_call"]


@dataclass(frozen=True, slots=True)
class Reply:
    """One scripted answer.

    Attributes:
        text: what the model says; reasoning and tool calls are written as the model would write them.
        finish_reason: ``length`` leaves the end token off, as a server does that ran out of ``max_tokens``.
        latency: seconds until the answer; None takes the server's.
        error: raised instead of an answer.
        hang: never answer.
    """

    text: str = ""
    finish_reason: str = "stop"
    latency: float | None = None
    error: BaseException | None = None
    hang: bool = False


Script = Sequence["str | Reply"] | Callable[..., "str | Reply | Awaitable[str | Reply]"]


@dataclass(slots=True)
class ScriptedRequest:
    """What the server was asked, and what it answered: the record that tests compare with.

    Attributes:
        prompt: what arrived, as text, special tokens included.
        sampling: the other arguments of the request.
        output_ids: one [output_len] int list per choice, end token included unless truncated.
        logprobs: one [output_len] float list per choice.
        finish_reasons: one per choice.
        cancelled: whether the caller gave the request up.
    """

    _prompt_ids: array[int]  # each of the lists that it would take is looked through in every garbage collection
    prompt: str
    sampling: dict[str, Any]
    output_ids: list[list[int]] = field(default_factory=list)
    logprobs: list[list[float]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    cancelled: bool = False

    @property
    def prompt_ids(self) -> list[int]:
        """``[prompt_len] int``, as they arrived."""
        return self._prompt_ids.tolist()


def tool_call(name: str, /, **arguments: Any) -> str:
    """The text of a call as Hermes and Qwen models write it, between ``<tool_call>`` tags."""
    return tool_call_block(name, arguments)


class ScriptedServer(APIServer):
    """An atroposlib server whose model is a script.

    Args:
        replies: a list, answered in order of arrival, or a function that is called with the conversation so far
            (OpenAI messages, read back from the prompt's tokens) and returns a reply; asynchronous or not.
        tokenizer: a tokenizer with a ChatML layout; the small one of this package by default.
        latency: seconds until each answer.
        end_token: what the model closes its turn with.

    Each output token has a logprob of its own, a function of its id and place. ``requests`` records every request
    in order of arrival.

    Raises:
        IndexError: from the model call, when the list of replies is used up.
    """

    def __init__(
        self,
        replies: Script,
        *,
        tokenizer: Any = None,
        latency: float = 0.0,
        end_token: str = "<|im_end|>",
        model_name: str = "scripted",
        max_requests: int = 4096,
    ) -> None:
        super().__init__(
            APIServerConfig(
                model_name=model_name,
                base_url="scripted://model",
                api_key="none",
                health_check=False,
                num_max_requests_at_once=max_requests,
                num_requests_for_eval=max_requests,
            )
        )
        self.tokenizer = tokenizer or chatml_tokenizer()
        self.replies = replies
        self.latency = latency
        self.end_token_id = self.tokenizer.convert_tokens_to_ids(end_token)
        self.requests: list[ScriptedRequest] = []
        self._next = 0
        self._texts: dict[bytes, str] = {}
        self._encode = functools.lru_cache(maxsize=256)(self.tokenizer.encode)

    async def check_server_status_task(self, chat_completion: bool = True) -> None:
        self.server_healthy = True

    async def scales_logprobs(self) -> bool:
        """What it says is sampled, with the logprob that it gives, whatever the temperature."""
        return True

    async def _tokens_and_logprobs_completion_wrapper(
        self, **kwargs: Any
    ) -> tuple[list[int], list[list[int]], list[list[float]], list[str]]:
        prompt_ids = kwargs.pop("input_ids", None)
        prompt = kwargs.pop("prompt", None)
        if prompt_ids is None:
            prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        request = ScriptedRequest(array("I", prompt_ids), "", kwargs)
        self.requests.append(request)
        try:
            request.prompt = await self._text(prompt_ids)
            replies = [await self._reply(request.prompt) for _ in range(kwargs.get("n") or 1)]
        except asyncio.CancelledError:
            request.cancelled = True
            raise
        for reply in replies:
            output_ids, finish_reason = self._sample(reply, kwargs.get("max_tokens"))
            request.output_ids.append(output_ids)
            request.logprobs.append([-((token * 31 + place) % 97 + 1) / 50 for place, token in enumerate(output_ids)])
            request.finish_reasons.append(finish_reason)
        # Fresh lists: a caller that alters what it got must not alter the record.
        return (
            request.prompt_ids,
            [list(ids) for ids in request.output_ids],
            [list(values) for values in request.logprobs],
            list(request.finish_reasons),
        )

    async def _text(self, ids: Sequence[int]) -> str:
        """The tokens as text, decoded turn by turn and remembered: prompts repeat one another.

        A real model server takes next to no time of the event loop that it is called from, and nor should this one.
        """
        pieces = []
        start = 0
        while start < len(ids):
            try:
                end = ids.index(self.end_token_id, start) + 1
            except ValueError:
                end = len(ids)
            piece = ids[start:end]
            key = array("I", piece).tobytes()
            if key not in self._texts:
                if len(self._texts) > 4096:
                    self._texts.clear()
                text = functools.partial(decode, self.tokenizer, piece)
                self._texts[key] = await asyncio.to_thread(text) if len(piece) > 1000 else text()
            pieces.append(self._texts[key])
            start = end
        return "".join(pieces)

    async def _reply(self, prompt: str) -> Reply:
        if callable(self.replies):
            answer = self.replies(parse_chatml(prompt))
            reply = await answer if inspect.isawaitable(answer) else answer
        else:
            reply = self.replies[self._next]
            self._next += 1
        if isinstance(reply, str):
            reply = Reply(reply)
        latency = self.latency if reply.latency is None else reply.latency
        if latency:
            await asyncio.sleep(latency)
        if reply.hang:
            await asyncio.Event().wait()
        if reply.error is not None:
            raise reply.error
        return reply

    def _sample(self, reply: Reply, max_tokens: int | None) -> tuple[list[int], str]:
        output_ids = list(self._encode(reply.text, add_special_tokens=False))
        if reply.finish_reason == "stop":
            output_ids = [*output_ids, self.end_token_id]
        if max_tokens is not None and len(output_ids) > max_tokens:
            return output_ids[:max_tokens], "length"
        return output_ids, reply.finish_reason

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        prompt = self.tokenizer.apply_chat_template(kwargs["messages"], tokenize=False, add_generation_prompt=True)
        reply = await self._reply(prompt)
        message = {"role": "assistant", "content": reply.text}
        choices = [{"index": 0, "finish_reason": reply.finish_reason, "message": message}]
        return ChatCompletion.model_validate(self._head("chat.completion") | {"choices": choices})

    async def _completion_wrapper(self, **kwargs: Any) -> Completion:
        _, outputs, _, reasons = await self._tokens_and_logprobs_completion_wrapper(**kwargs)
        choices = [
            {"index": i, "finish_reason": reason, "text": self.tokenizer.decode(ids, skip_special_tokens=True)}
            for i, (ids, reason) in enumerate(zip(outputs, reasons, strict=True))
        ]
        return Completion.model_validate(self._head("text_completion") | {"choices": choices})

    def _head(self, kind: str) -> dict[str, Any]:
        number = len(self.requests)
        return {"id": f"{kind}-{number}", "object": kind, "created": int(time.time()), "model": self.config.model_name}


def parse_chatml(prompt: str) -> list[dict[str, str]]:
    """The messages of a ChatML prompt, by role and text; tool results stand in a ``user`` message as the template wrote
    them."""
    messages = []
    for block in prompt.split("<|im_start|>")[1:]:
        role, _, rest = block.partition("\n")
        content, closed, _ = rest.partition("<|im_end|>")
        if closed:
            messages.append({"role": role, "content": content})
    return messages
