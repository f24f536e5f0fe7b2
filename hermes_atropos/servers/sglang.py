"""SGLang."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from hermes_atropos.errors import BackendResponseError, ConfigurationError
from hermes_atropos.servers.failures import response_error
from hermes_atropos.servers.http import Choice, OpenAIEndpoint, TokenServer
from hermes_atropos.servers.sampling import SGLANG, sglang_grammar

__all__ = ["StockSGLangServer"]


class StockSGLangServer(TokenServer):
    """SGLang, stock or started by Atropos, through its native ``/generate``; the prompt is not echoed.

    https://docs.sglang.io/basic_usage/native_api.html and …/sampling_params.html. ``logprob_start_len`` stays unset: 0
    would ask for the prompt's logprobs and defeat the prefix cache. The weights of an answer are told by the version
    that the trainer passed with its last update.
    """

    parameters = SGLANG
    streams = True
    # A request for a prompt and an answer that fill the context is refused (TokenizerManager._validate_one_request).
    reserved = 1

    # /health generates a token; the list of models does not.
    is_healthy = OpenAIEndpoint.is_healthy

    async def build_request(self, prompt_ids: list[int], sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        await self._check_vocabulary(prompt_ids)
        # None is "as long as the context allows"; unset would be 128.
        sampling["max_new_tokens"] = await self.max_tokens_for(prompt_ids, sampling.pop("max_tokens", None))
        for ours, theirs in (("seed", "sampling_seed"), ("min_tokens", "min_new_tokens")):
            if ours in sampling:
                sampling[theirs] = sampling.pop(ours)
        if grammar := sampling.pop("structured_outputs", None):
            sampling |= sglang_grammar(grammar)
        return f"{self.root}/generate", {"input_ids": prompt_ids, "sampling_params": sampling, "return_logprob": True}

    async def _check_vocabulary(self, prompt_ids: list[int]) -> None:
        """An id beyond the model's vocabulary would end the server's process."""
        vocabulary = await self._once(self._told_vocabulary)
        if vocabulary is not None and prompt_ids and max(prompt_ids) >= vocabulary:
            raise ConfigurationError(
                f"the prompt has the token {max(prompt_ids)}, and the model at {self.root} has {vocabulary} "
                "tokens: the tokenizer is another model's; pass the model's own as tokenizer="
            )

    async def _told_vocabulary(self) -> int | None:
        """The model's vocabulary: told in the refusal of a bias for a token that no model has."""
        body = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "logit_bias": {str(2**40): 0.0}}}
        try:
            await self.request("POST", f"{self.root}/generate", body)
        except BackendResponseError as refusal:
            told = re.search(r"keys in \[0, (\d+)\]", refusal.body or "")
            return int(told[1]) + 1 if told else None
        return None

    async def told_tokenizer(self) -> str | None:
        """``tokenizer_path`` of ``/model_info``: the list of models has the name under which the model is served."""
        with contextlib.suppress(BackendResponseError, AttributeError):
            return (await self.request("GET", f"{self.root}/model_info")).get("tokenizer_path")
        return None

    def read_chunk(self, chunk: Any, sampled: int) -> tuple[list[int] | None, Choice | None]:
        """A chunk has all tokens so far or, with ``--incremental-streaming-output``, those that it adds."""
        told = chunk["meta_info"]
        places = told.get("output_token_logprobs") or []
        if len(places) == told["completion_tokens"]:
            places = places[sampled:]
        return None, self._choice({**told, "output_token_logprobs": places})

    def read_answer(self, answer: Any) -> tuple[list[int] | None, list[Choice]]:
        return None, [
            self._choice(choice["meta_info"]) for choice in (answer if isinstance(answer, list) else [answer])
        ]

    def _choice(self, told: Mapping[str, Any]) -> Choice:
        reason = dict(told["finish_reason"] or {"type": None})
        if reason["type"] == "abort" and (status := reason.get("status_code")):  # a refusal, told with success
            raise response_error(f"{self.root}/generate", int(status), str(reason.get("message")))
        places = told["output_token_logprobs"]
        if "weight_version" in told:
            reason["weights_version"] = told["weight_version"]
        return [place[1] for place in places], [place[0] for place in places], reason
