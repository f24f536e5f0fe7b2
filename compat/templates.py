"""Chat templates as models ship them: is a call read as the template writes it, or is the model refused?

    .venv/bin/python compat/templates.py FOLDER ...     # every *.jinja below, such as an unpacked llama.cpp's

For each template: a small tokenizer that has the tokens which the template names, an agent, and a model that answers
with what the template itself writes for a call, then with words, and when the user speaks again with words again. A
table goes to the standard output: the format, and whether the tokens went on or why a sequence began, behind a result
and behind a user's message. The exit status is 1 if a run ended as completed and the tool did not get exactly what
stood in the call.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from hermes_atropos import AgentConfig, AtroposAgent, StopReason, ToolRegistry
from hermes_atropos.errors import ConfigurationError
from hermes_atropos.rendering import renderer_for
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer, tool_call

# What is one token in the vocabularies of the models whose templates these are.
TOKENS = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<\|[a-z_:]+>|<[a-z_:]+\|>|<SPECIAL_\d+>|\]<\][a-z]+\[>\[|\[/?[A-Z_]{3,20}\]"
    r"|</?(?:s|eos|bos|think|assistant|TOOLCALL|seed:[a-z]+)>|\[e~\[|\]~!?b[\[\]]|<(?:start|end)_of_turn>"
)
ENDS = {
    "<think>": "</think>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
}
ARGUMENTS = {"path": "notes of today.txt", "count": 3, "deep": True}
# What models write whose templates leave calls out, by what stands in those: as vLLM's parsers of these models read it.
PYTHON = "look_up(path='notes of today.txt', count=3, deep=True)"
JSON = json.dumps(ARGUMENTS)
PAIRS = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in ARGUMENTS.items())
KIMI = f"<|tool_call_begin|>functions.look_up:0<|tool_call_argument_begin|>{JSON}<|tool_call_end|>"
MODELS = {
    "<|tool_list_start|>": f"<|tool_call_start|>[{PYTHON}]<|tool_call_end|>",
    "<|tool_call|>": f'<|tool_call|>[{{"name": "look_up", "arguments": {JSON}}}]',
    "<|tool_call_begin|>": f"<|tool_calls_section_begin|>{KIMI}<|tool_calls_section_end|>",
    "<arg_key>": f"<tool_call>look_up\n{PAIRS}</tool_call>",
}
USER = {"role": "user", "content": "Look at the notes."}
WORDS = "Nothing of note."


def look_up(path: str, count: int, deep: bool) -> str:
    """Look something up.

    Args:
        path: where.
        count: how many.
        deep: whether to go on below.
    """
    CALLED.append({"path": path, "count": count, "deep": deep})
    return "found"


CALLED: list[dict[str, Any]] = []


def tokenizer_for(template: str) -> Any:
    """The small tokenizer with a template, and with the tokens that the template names."""
    from transformers import AddedToken, PreTrainedTokenizerFast

    small = chatml_tokenizer()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(small.backend_tokenizer).from_str(small.backend_tokenizer.to_str()),
        eos_token="<|im_end|>",
        bos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    named = sorted(set(TOKENS.findall(template)))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in named], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def as_written(tokenizer: Any, tools: list[Any]) -> tuple[str | None, str, str]:
    """What the template writes of an answer that is a call, None if it writes none, and what ends that and another."""

    def render(*answer: dict[str, Any], opened: bool = False) -> str:
        messages = [USER, *answer]
        return str(
            tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False, add_generation_prompt=opened)
        )

    try:
        render(opened=True)
    except Exception:  # it takes no such tools
        tools = []
    words = render({"role": "assistant", "content": WORDS})
    prompt = render(opened=True)
    found = TOKENS.match(words.partition(WORDS)[2].lstrip())
    role = "<|user|>" if "<|user|>" in tokenizer.chat_template else tokenizer.eos_token  # GLM: no turn has an end
    end = found[0] if found else role
    attempts = itertools.product(("call00001", "functions.look_up:0"), ("", None), (ARGUMENTS, json.dumps(ARGUMENTS)))
    for call_id, content, arguments in attempts:
        function = {"name": "look_up", "arguments": arguments}
        call = {"id": call_id, "type": "function", "function": function}
        try:
            whole = render({"role": "assistant", "content": content, "tool_calls": [call]})
        except Exception:  # whatever a template raises: it takes no such call
            continue
        first = same(whole, words)
        first = next((token.start() for token in TOKENS.finditer(whole) if token.start() <= first < token.end()), first)
        said = whole[first:]
        if "notes of today.txt" not in said or "look_up" not in said or (isinstance(arguments, dict) and "': " in said):
            continue  # left out, or an object printed as Python does where the template takes text
        cut = len(said) - same(said[::-1], words[::-1])
        cut = next((token.end() for token in TOKENS.finditer(said) if token.start() < cut < token.end()), cut)
        found = TOKENS.match(said[cut:].lstrip())
        said = said[:cut].rstrip().removesuffix(end)
        opening = next((tag for tag in ENDS if prompt.rstrip().endswith(tag)), None)
        return (
            (f"I look.\n{ENDS[opening]}\n\n{said}" if opening else said),
            found[0] if found else end.replace("user", "observation"),
            end,
        )
    taught = "look_up" in prompt
    return next((call for mark, call in MODELS.items() if taught and mark in tokenizer.chat_template), None), end, end


def same(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


async def tried(template: str) -> list[str]:
    """What becomes of a model with that template, in what format, and how its conversation goes on; or why not."""
    CALLED.clear()
    tokenizer = tokenizer_for(template)
    registry = ToolRegistry([look_up])
    server = ScriptedServer([], tokenizer=tokenizer)
    try:
        agent = AtroposAgent(server, tools=registry, config=AgentConfig(max_tool_call_retries=0, max_steps=3))
    except ConfigurationError as error:
        return ["refused", str(error).splitlines()[0]]
    written, call_end, end = as_written(tokenizer, registry.definitions)
    prompt = tokenizer.apply_chat_template([USER], tools=registry.definitions, tokenize=False) if not written else ""
    if "look_up" in prompt:
        return ["UNKNOWN", "how this model calls: add it to MODELS"]
    replies = iter([(written or tool_call("look_up", **ARGUMENTS), call_end), (WORDS, end), (WORDS, end)])

    def reply(_: Any) -> str:
        said, token = next(replies)
        server.end_token_id = tokenizer.convert_tokens_to_ids(token)
        return said

    server.replies = reply
    async with agent.task() as task:
        result = await task.run(USER["content"])
        if result.stop_reason is not StopReason.COMPLETED or CALLED != [ARGUMENTS]:
            outcome = "UNREAD" if result.stop_reason is StopReason.COMPLETED else str(result.stop_reason)
            return [outcome, f"{result.error} {CALLED} {result.messages[2:3]}"]
        result = await task.run(USER["content"], conversation_history=result.messages)
    turns = sorted((turn for one in result.sequences for turn in one.metadata["turns"]), key=lambda turn: turn["ref"])
    [_, behind_result, behind_user] = [str(turn["cause"] or "goes on") for turn in turns]
    return ["read" if written else "taught", renderer_for(tokenizer).tool_format, behind_result, behind_user]


def main(folders: list[str]) -> int:
    outcomes = Counter[str]()
    for path in (found for folder in folders for found in sorted(Path(folder).rglob("*.jinja"))):
        row = asyncio.run(tried(path.read_text()))
        outcomes[row[0]] += 1
        print("|", " | ".join([path.stem, *row]), "|", flush=True)
    print(dict(outcomes))
    return (outcomes["UNREAD"] + outcomes["UNKNOWN"]) > 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
