"""vLLM through its OpenAI-compatible completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hermes_atropos.errors import BackendResponseError
from hermes_atropos.servers.failures import BODY_KEPT
from hermes_atropos.servers.http import Choice, TokenServer, register
from hermes_atropos.servers.sampling import VLLM

__all__ = ["StockVLLMServer"]


@register
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

    def add_chunk(self, answer: dict[str, Any], chunk: Any) -> list[int]:
        """A chunk has the ids and logprobs that it adds, and the first the prompt's ids."""
        [piece] = chunk["choices"] or [None]
        if piece is None:  # of usage alone
            return []
        told = piece.get("logprobs") or {}
        piece = piece | {"logprobs": {key: list(told.get(key) or []) for key in ("tokens", "token_logprobs")}}
        ids, _, _ = self._choice(piece) if piece.get("token_ids") or told else ([], [], None)
        if not answer:
            answer.update(chunk, choices=[piece | {"token_ids": list(ids)}])
            return ids
        [whole] = answer["choices"]
        whole["token_ids"] += ids
        for key, values in whole["logprobs"].items():
            values += piece["logprobs"][key]
        whole["finish_reason"] = piece["finish_reason"] or whole["finish_reason"]
        return ids

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
