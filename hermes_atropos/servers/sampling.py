"""How tokens are drawn: neutral values, structured outputs in each engine's words, and what the logprobs are of.

A checkpoint's ``generation_config.json`` fills in what a request leaves out (vLLM's ``--generation-config``, SGLang's
``--preferred-sampling-params``), so a request leaves nothing out that shapes the distribution.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hermes_atropos.errors import SamplingError

__all__ = [
    "COMMON",
    "FORMS",
    "NEUTRAL",
    "SGLANG",
    "VLLM",
    "derived_seed",
    "distribution",
    "reads_its_answer",
    "settle_grammar",
    "sglang_grammar",
    "skew",
    "unknown",
]

#: What leaves the model's distribution as it is, in vLLM's and in SGLang's terms.
NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

#: Further parameters that every engine knows.
COMMON = frozenset(
    {*NEUTRAL, "ignore_eos", "logit_bias", "max_tokens", "min_tokens", "n", "seed", "stop", "stop_token_ids"}
)

#: What vLLM's sampler takes, and SGLang's by vLLM's names.
VLLM = COMMON | frozenset(
    {"allowed_token_ids", "bad_words", "include_stop_str_in_output", "skip_special_tokens", "structured_outputs"}
)
SGLANG = COMMON | frozenset(
    {"custom_params", "no_stop_trim", "skip_special_tokens", "stop_regex", "structured_outputs"}
)

#: Names under which an answer's form is asked for, and vLLM's word for each form.
GRAMMARS = {"json_schema": "json", "regex": "regex", "ebnf": "grammar", "structural_tag": "structural_tag"}
NESTED = frozenset({"structured_outputs", "guided_decoding"})
FORMS = NESTED | GRAMMARS.keys() | {"response_format"}

#: SGLang's words for vLLM's.
SGLANG_GRAMMARS = {form: name for name, form in GRAMMARS.items()}

# What says when to stop, or how the answer is handed over; the distribution stays.
_HARMLESS = frozenset(
    {
        "cache_salt",
        "extra_body",
        "ignore_eos",
        "include_stop_str_in_output",
        "lora_path",
        "max_tokens",
        "n",
        "no_stop_trim",
    }
    | {"priority", "request_id", "rid", "seed", "session_id", "skip_special_tokens", "spaces_between_special_tokens"}
    | {"split", "stop", "stop_regex", "stop_token_ids", "user"}
)

# What depends on where the answer began, or is looked for across the seam of two parts.
_READS_ITS_ANSWER = frozenset({"bad_words", "frequency_penalty", "presence_penalty", "stop", "stop_regex"} | FORMS)


def unknown(sampling: Mapping[str, Any], extra: Mapping[str, Any], parameters: frozenset[str]) -> list[str]:
    """Which of them a server that takes ``parameters`` would ignore or refuse.

    Args:
        extra: given as the server's own, so that only what is known to be another engine's counts.
    """
    known = parameters | FORMS if "structured_outputs" in parameters else parameters
    return sorted((sampling.keys() - known) | (extra.keys() & ((VLLM | SGLANG | FORMS) - known)))


def settle_grammar(sampling: dict[str, Any]) -> None:
    """Put the wish for an answer of some form, however it was given, under ``structured_outputs``, as vLLM has it.

    Raises:
        SamplingError: there are several wishes, or one that is not known.
    """
    wishes = {GRAMMARS[name]: sampling.pop(name) for name in GRAMMARS.keys() & sampling.keys()}
    for name in NESTED & sampling.keys():
        nested = sampling.pop(name)
        if not isinstance(nested, Mapping):
            raise SamplingError(f"{name}={nested!r}: give a dict, such as {{'regex': 'a+'}}")
        wishes |= {form: wish for form, wish in nested.items() if wish is not None}
    wishes |= _of_response_format(sampling.pop("response_format", None) or {"type": "text"})
    if len(wishes) > 1:
        raise SamplingError(f"an answer has one form, not {sorted(wishes)}: give one of them")
    if wishes:
        sampling["structured_outputs"] = wishes


def _of_response_format(wish: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's wish."""
    match wish:
        case {"type": "json_schema", "json_schema": {"schema": schema}}:
            return {"json": schema}
        case {"type": "json_object"}:
            return {"json_object": True}
        case {"type": "text"}:
            return {}
    raise SamplingError(f"response_format={wish!r:.200} is not one of OpenAI's: give {{'type': 'json_object'}}, …")


def sglang_grammar(wish: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's ``structured_outputs`` as SGLang's parameters.

    Raises:
        SamplingError: SGLang has no such form.
    """
    [(form, value)] = wish.items()
    if form == "json_object":
        form, value = "json", {"type": "object"}
    if form not in SGLANG_GRAMMARS:
        raise SamplingError(f"SGLang has no structured output {form!r}: give one of {sorted(SGLANG_GRAMMARS.values())}")
    return {SGLANG_GRAMMARS[form]: value if isinstance(value, str) else json.dumps(value)}


def distribution(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that make the distribution another one than the softmax of the model's logits; empty if none."""
    return {
        name: value
        for name, value in {**sampling, **sampling.get("extra_body", {})}.items()
        if name not in _HARMLESS and not (value == NEUTRAL.get(name) or (value in (None, 0, {}, []) and name in _OFF))
    }


# Off where they are 0 or empty. (A top_k of 0 is off in vLLM alone; a temperature of 0 is greedy.)
_OFF = frozenset({"bad_words", "logit_bias", "min_tokens", "top_k"})


def skew(shaping: Mapping[str, Any], scaled: bool | None) -> str | None:
    """Why recorded logprobs are not of the distribution that was sampled from; None if they are.

    Args:
        shaping: of ``distribution``.
        scaled: whether the server's logprobs are those after the temperature; None where nobody knows.
    """
    others = {name: value for name, value in shaping.items() if name != "temperature"}
    if others:
        given = ", ".join(f"{name}={value!r:.60}" for name, value in others.items())
        return f"sampled with {given}, and the logprobs are not of what that leaves of the distribution"
    temperature = shaping.get("temperature")
    if temperature is None:
        return None
    if temperature == 0:
        return "sampled greedily (temperature=0), which no logprob describes"
    if scaled is None:
        return f"sampled with temperature={temperature!r}, and it is not known whether the logprobs are those after it"
    return None if scaled else f"sampled with temperature={temperature!r}, and the logprobs are those before it"


def reads_its_answer(sampling: Mapping[str, Any]) -> bool:
    """Whether the rest of an aborted answer, asked for with what there is as a part of the prompt, is another draw."""
    return any(sampling[name] != NEUTRAL.get(name) for name in _READS_ITS_ANSWER & sampling.keys())


def derived_seed(*numbers: int) -> int:
    """A seed of 31 bits that these numbers determine."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4]) >> 1
