"""The embedded model as an atroposlib ``APIServer``: rollouts, trainers and tests without a server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atroposlib.envs.server_handling.server_baseline import APIServer, APIServerConfig, ReasoningConfig
from openai.types.chat.chat_completion import ChatCompletion
from openai.types.completion import Completion

from hermes_atropos.embedded.engine import Engine, Request
from hermes_atropos.embedded.llama import Llama
from hermes_atropos.embedded.sampler import read_sampling
from hermes_atropos.errors import BackendResponseError, ContextLengthError
from hermes_atropos.listening import token_listener
from hermes_atropos.rendering.tokenizers import decode, load_tokenizer, template_text

__all__ = ["MODEL", "EmbeddedServer"]

#: The checkpoint that comes with the package.
MODEL = Path(__file__).parent / "model"

# What atroposlib's calls bring along that is not for the sampler.
_NOT_SAMPLING = frozenset({"model", "split", "messages", "tools", "logprobs", "stream", "skip_reasoning"})


class EmbeddedServer(APIServer):
    """A small Llama that runs in this process, on a thread that is there while it has something to do.

    The logprobs are those after the temperature (``scales_logprobs``), before ``top_k`` and ``top_p``; greedy, those at
    temperature 1. Each finish reason tells which weights sampled the answer.

    Args:
        config, reasoning_config: as atroposlib's ``ServerManager`` hands them to a server class; by default one that
            takes any number of requests.
        checkpoint: the folder of a Llama in Hugging Face's format, tokenizer included. By default what
            ``config.model_name`` names, if that is such a folder, else the checkpoint of this package.
        cache_tokens: as in ``Engine``.

    Attributes:
        engine: answers; here its load is seen.
        context_length: tokens that prompt and answer may have together.

    Raises:
        CheckpointError: the checkpoint is not one that can be run here.
    """

    def __init__(
        self,
        config: APIServerConfig | None = None,
        reasoning_config: ReasoningConfig | None = None,
        *,
        checkpoint: str | Path | None = None,
        cache_tokens: int = 2**17,
    ) -> None:
        config = config or APIServerConfig(
            model_name="embedded",
            base_url="embedded://model",
            api_key="none",
            health_check=False,
            num_max_requests_at_once=4096,
            num_requests_for_eval=4096,
        )
        super().__init__(config, reasoning_config=reasoning_config)
        named = Path(self.config.model_name)
        self.checkpoint = Path(checkpoint or (named if (named / "config.json").exists() else MODEL))
        self.engine = Engine(Llama(self.checkpoint), cache_tokens=cache_tokens)
        self.context_length = self.engine.model.config.max_position_embeddings
        self._versions = itertools.count(1)

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's, loaded when first asked for.

        Raises:
            NoTokenizerError: it has none.
        """
        return load_tokenizer(str(self.checkpoint))

    async def check_server_status_task(self, chat_completion: bool = True) -> None:
        self.server_healthy = True

    async def scales_logprobs(self) -> bool:
        """They are those after the temperature."""
        return True

    async def load_weights(self, folder: str | Path, version: str | None = None) -> None:
        """Answer with other weights from the next token on, under a version that is a number unless one is given.

        Raises:
            CheckpointError: they can't be read or are of another shape; the old ones stay.
        """
        await asyncio.to_thread(self.engine.load_weights, folder, version or str(next(self._versions)))

    async def _tokens_and_logprobs_completion_wrapper(
        self, **kwargs: Any
    ) -> tuple[list[int], list[list[int]], list[list[float]], list[dict[str, Any]]]:
        """Sample ``n`` answers to ``input_ids``, or to the text ``prompt``; as ``TokenServer`` answers.

        Raises:
            SamplingError: a parameter that isn't known.
            ContextLengthError: the prompt leaves no room for an answer.
            BackendResponseError: an empty prompt, or ids that the model does not have.
        """
        prompt, prompt_ids = kwargs.pop("prompt", None), kwargs.pop("input_ids", None)
        if prompt_ids is None:
            prompt_ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        prompt_ids, listener = list(prompt_ids), token_listener.get()
        if listener is None or kwargs.get("n") not in (None, 1):
            answers = await self.sample(prompt_ids, kwargs)
        else:
            told = 0

            def tell(answer: Request) -> None:
                nonlocal told
                new = answer.output_ids[told:]
                told += len(new)
                listener.more(new)

            listener.begin(prompt_ids)
            answers = await self.sample(prompt_ids, kwargs, tell)
        return (
            prompt_ids,
            [answer.output_ids for answer in answers],
            [answer.logprobs for answer in answers],
            [{"type": answer.finish_reason, "weights": answer.weights} for answer in answers],
        )

    async def sample(
        self, prompt_ids: list[int], arguments: Mapping[str, Any], heard: Callable[[Request], object] | None = None
    ) -> list[Request]:
        """The answers to a prompt, ended. When the await is cancelled, they are given up at the next step.

        Args:
            arguments: the sampling parameters, and what else atroposlib's calls bring along.
            heard: called whenever an answer has a further token, and when it has ended.

        Raises:
            SamplingError, ContextLengthError, BackendResponseError: as the token call.
        """
        sampling = read_sampling({name: value for name, value in arguments.items() if name not in _NOT_SAMPLING})
        room = self._room(prompt_ids)
        eos = frozenset() if sampling.ignore_eos else self.engine.model.config.eos_token_ids
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def look(request: Request) -> None:
            if heard is not None:
                heard(request)
            if all(one.ended for one in requests):
                ended.set()

        def told(request: Request) -> None:
            if request.ended or heard is not None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                    loop.call_soon_threadsafe(look, request)

        def ends(ids: list[int]) -> bool:
            text = decode(self.tokenizer, ids, skip_special_tokens=True)
            return any(stop in text for stop in sampling.stop)

        max_tokens = min(sampling.max_tokens or room, room)
        requests = [
            Request(prompt_ids, sampling, choice, max_tokens, eos | sampling.stop_token_ids, ends, told)
            for choice in range(sampling.n)
        ]
        self.engine.submit(requests)
        try:
            await ended.wait()
        finally:
            for request in requests:
                request.forsaken = True
        for request in requests:
            if request.failure is not None:
                raise BackendResponseError(f"the embedded model failed: {request.failure!r}") from request.failure
        return requests

    def _room(self, prompt_ids: Sequence[int]) -> int:
        """Tokens that an answer may have."""
        vocab_size = self.engine.model.config.vocab_size
        if not prompt_ids:
            raise BackendResponseError("the prompt is empty: give at least one token", attempts=0)
        if strange := [token for token in prompt_ids if not 0 <= token < vocab_size]:
            raise BackendResponseError(
                f"the model has {vocab_size} tokens, and token {strange[0]} is not among them: give it prompts of its "
                "own tokenizer",
                attempts=0,
            )
        room = self.context_length - len(prompt_ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(prompt_ids)} tokens, the context {self.context_length}: shorten the conversation",
                attempts=0,
            )
        return room

    async def _chat_completion_wrapper(self, **kwargs: Any) -> ChatCompletion:
        """Plain text: tool calls stand in the content, as the model wrote them."""
        kwargs["prompt"] = template_text(self.tokenizer, kwargs.pop("messages"), kwargs.pop("tools", None))
        answers = await self._texts(kwargs)
        choices = [
            {"index": i, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
            for i, (text, reason) in enumerate(answers)
        ]
        return ChatCompletion.model_validate(self._head("chat.completion") | {"choices": choices})

    async def _completion_wrapper(self, **kwargs: Any) -> Completion:
        answers = await self._texts(kwargs)
        choices = [{"index": i, "finish_reason": reason, "text": text} for i, (text, reason) in enumerate(answers)]
        return Completion.model_validate(self._head("text_completion") | {"choices": choices})

    async def _texts(self, kwargs: dict[str, Any]) -> list[tuple[str, str]]:
        _, outputs, _, reasons = await self._tokens_and_logprobs_completion_wrapper(**kwargs)
        return [
            (decode(self.tokenizer, ids, skip_special_tokens=True), "stop" if reason["type"] == "stop" else "length")
            for ids, reason in zip(outputs, reasons, strict=True)
        ]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": "embedded", "object": kind, "created": int(time.time()), "model": self.config.model_name}
