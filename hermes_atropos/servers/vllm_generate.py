"""vLLM through its endpoint for tokens alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hermes_atropos.servers.http import Choice, TokenServer, register
from hermes_atropos.servers.sampling import VLLM

__all__ = ["VLLMGenerateServer"]


@register
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

    def add_chunk(self, answer: dict[str, Any], chunk: Any) -> list[int]:
        """A chunk has what it adds, the first the prompt's ids, and the last which weights sampled all."""
        [piece] = chunk["choices"]
        ids, _, _ = self._choice(piece)
        if not answer:
            answer.update(chunk)
            return ids
        [before] = answer["choices"]
        places = [*before["logprobs"]["content"], *(piece["logprobs"] or {}).get("content", [])]
        answer["choices"] = [
            {**before, **piece, "token_ids": [*before["token_ids"], *ids], "logprobs": {"content": places}}
        ]
        return ids

    def _choice(self, choice: Mapping[str, Any]) -> Choice:
        reason = {"type": choice["finish_reason"]}
        if spans := choice.get("weight_versions"):
            reason["weights"] = [{key: span[key] for key in ("start", "end", "version")} for span in spans]
        places = (choice["logprobs"] or {}).get("content") or []
        return choice["token_ids"] or [], [place["logprob"] for place in places], reason
