"""SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hermes_atropos.servers.http import Choice, TokenServer, register

__all__ = ["StockSGLangServer"]


@register
class StockSGLangServer(TokenServer):
    """SGLang, stock or started by Atropos, through its native ``/generate``; the prompt is not echoed.

    https://docs.sglang.io/basic_usage/native_api.html and …/sampling_params.html. ``logprob_start_len`` stays unset: 0
    would ask for the prompt's logprobs and defeat the prefix cache. The ``weights_version`` beside the finish reason is
    what the trainer passed with its last weight update.
    """

    async def build_request(self, prompt_ids: list[int], sampling: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        # None is "as long as the context allows"; unset would be 128.
        sampling["max_new_tokens"] = await self.max_tokens_for(prompt_ids, sampling.pop("max_tokens", None))
        for ours, theirs in (("seed", "sampling_seed"), ("min_tokens", "min_new_tokens")):
            if ours in sampling:
                sampling[theirs] = sampling.pop(ours)
        return f"{self.root}/generate", {"input_ids": prompt_ids, "sampling_params": sampling, "return_logprob": True}

    def read_answer(self, answer: Any) -> tuple[list[int] | None, list[Choice]]:
        return None, [
            self._choice(choice["meta_info"]) for choice in (answer if isinstance(answer, list) else [answer])
        ]

    def _choice(self, told: Mapping[str, Any]) -> Choice:
        places = told["output_token_logprobs"]
        reason = dict(told["finish_reason"] or {"type": None})
        if "weight_version" in told:
            reason["weights_version"] = told["weight_version"]
        return [place[1] for place in places], [place[0] for place in places], reason
