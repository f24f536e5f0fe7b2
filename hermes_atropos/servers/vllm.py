"""vLLM, through its OpenAI-compatible completions and through its endpoint for tokens alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hermes_atropos.errors import BackendResponseError
from hermes_atropos.servers.failures import BODY_KEPT
from hermes_atropos.servers.http import Choice, TokenServer
from hermes_atropos.servers.sampling import VLLM

__all__ = ["StockVLLMServer", "VLLMGenerateServer"]


class StockVLLMServer(TokenServer):
    """Stock ``vllm serve``, through ``/v1/completions`` with token ids in and ``return_token_ids``.

    https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html, "Completions API". ``logprobs: 0`` asks for
    the sampled token alone. Before 0.10.2, which brought ``return_token_ids``, the ids are read from
    ``return_tokens_as_token_ids``, and the prompt is not echoed. Which weights sampled an answer is never told.
    """

    parameters = VLLM
    streams = True

    async def build_request(self, prompt_ids: list[int], sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        max_tokens = await self.max_tokens_for(prompt_ids, sampling.get("max_tokens"))
        if max_tokens is None:  # vLLM would stop after 16 tokens
            raise BackendResponseError(
                f"{self.root} does not say how long its context is: pass max_tokens",
                url=self.root,
            )
        return f"{self.base_url}/completions", {
            "model": self.config.model_name,
            "prompt": prompt_ids,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **sampling,
            "max_tokens": max_tokens,
        }

    def read_answer(self, answer: Any) -> tuple[list[int] | None, list[Choice]]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return choices[0].get("prompt_token_ids"), [self._choice(choice) for choice in choices]

    def read_chunk(self, chunk: Any, sampled: int) -> tuple[list[int] | None, Choice | None]:
        if not chunk["choices"]:  # of usage alone
            return None, None
        [piece] = chunk["choices"]
        if not (piece.get("token_ids") or piece.get("logprobs")):
            return piece.get("prompt_token_ids"), ([], [], piece["finish_reason"])
        return super().read_chunk(chunk, sampled)

    def _choice(self, choice: Mapping[str, Any]) -> Choice:
        logprobs = choice.get("logprobs") or {}
        ids = choice.get("token_ids")
        if ids is None:
            tokens = logprobs.get("tokens") or []
            if not tokens or not all(token.startswith("token_id:") for token in tokens):
                raise BackendResponseError(
                    f"{self.base_url}/completions returns no token ids: serve the model with vLLM 0.10.2 or newer, or "
                    "with SGLang",
                    url=f"{self.base_url}/completions",
                    status=200,
                    body=json.dumps(choice)[:BODY_KEPT],
                )
            ids = [int(token.removeprefix("token_id:")) for token in tokens]
        return ids, logprobs.get("token_logprobs") or [], choice["finish_reason"]


class VLLMGenerateServer(TokenServer):
    """vLLM through ``/inference/v1/generate``, which never turns tokens into text.

    https://docs.vllm.ai/en/latest/api/vllm/entrypoints/serve/disagg/protocol/. Newer releases want ``--tokens-only`` or
    ``--enable-scale-out`` for it, and answer 403 without. They echo the prompt, and tell for each stretch of an answer
    which weights sampled it.
    """

    parameters = VLLM
    streams = True

    async def build_request(self, prompt_ids: list[int], sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        # max_tokens None is "as long as the context allows"; unset would be 16 in older releases.
        sampling["max_tokens"] = await self.max_tokens_for(prompt_ids, sampling.get("max_tokens"))
        return f"{self.root}/inference/v1/generate", {
            "model": self.config.model_name,
            "token_ids": prompt_ids,
            "return_token_ids": True,
            "sampling_params": {"logprobs": 0, **sampling},
        }

    def read_answer(self, answer: Any) -> tuple[list[int] | None, list[Choice]]:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return answer.get("prompt_token_ids"), [self._choice(choice) for choice in choices]

    def _choice(self, choice: Mapping[str, Any]) -> Choice:
        reason = {"type": choice["finish_reason"]}
        if spans := choice.get("weight_versions"):
            reason["weights"] = [{key: span[key] for key in ("start", "end", "version")} for span in spans]
        places = (choice["logprobs"] or {}).get("content") or []
        return choice["token_ids"] or [], [place["logprob"] for place in places], reason
