"""The vLLM server that Atropos ships."""

from __future__ import annotations

from typing import Any

from hermes_atropos.servers.http import Choice, TokenServer
from hermes_atropos.servers.sampling import VLLM

__all__ = ["AtroposVLLMServer"]


class AtroposVLLMServer(TokenServer):
    """The vLLM server that Atropos ships with its example trainer, through its ``/generate``.

    ``logprobs[choice][position]`` is ``[{id: logprob}]`` of the sampled token; newer versions echo the prompt.
    """

    parameters = VLLM - {"structured_outputs"}  # it takes no object of vLLM's

    async def build_request(self, prompt_ids: list[int], sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        # max_tokens None is "as long as the context allows"; unset would be 16.
        return f"{self.root}/generate", {
            "prompt": {"prompt_token_ids": prompt_ids},
            "logprobs": 0,
            "max_tokens": None,
            **sampling,
        }

    def read_answer(self, answer: Any) -> tuple[list[int] | None, list[Choice]]:
        sampled = [[next(iter(place[0].items())) for place in choice] for choice in answer["logprobs"]]
        return answer.get("prompt_token_ids"), [
            ([int(token) for token, _ in places], [logprob for _, logprob in places], reason)
            for places, reason in zip(sampled, answer["finish_reasons"], strict=True)
        ]
