"""vLLM through its endpoint for tokens alone."""

from __future__ import annotations

from typing import Any

from hermes_atropos.servers.http import Choice, TokenServer, register

__all__ = ["VLLMGenerateServer"]


@register
class VLLMGenerateServer(TokenServer):
    """vLLM through ``/inference/v1/generate``, which never turns tokens into text; the prompt is not echoed.

    https://docs.vllm.ai/en/latest/api/vllm/entrypoints/serve/disagg/protocol/. Newer releases want ``--tokens-only`` or
    ``--enable-scale-out`` for it, and answer 403 without.
    """

    async def build_request(self, prompt_ids: list[int], sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        # max_tokens None is "as long as the context allows"; unset would be 16 in older releases.
        sampling["max_tokens"] = await self.max_tokens_for(prompt_ids, sampling.get("max_tokens"))
        return f"{self.root}/inference/v1/generate", {
            "model": self.config.model_name,
            "token_ids": prompt_ids,
            "sampling_params": {"logprobs": 0, **sampling},
        }

    def read_answer(self, answer: Any) -> tuple[list[int] | None, list[Choice]]:
        return None, [
            (
                choice["token_ids"],
                [place["logprob"] for place in choice["logprobs"]["content"]],
                choice["finish_reason"],
            )
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
        ]
