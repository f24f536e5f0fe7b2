"""One rollout from end to end, without a network or a GPU: run it with ``make demo``.

Hermes' own terminal and file tools act in a temporary workspace. The model is scripted, and one of its tool calls is
malformed. A verifier scores the workspace, and the tokens that a trainer would get are compared with what the model's
server was sent and sampled.
"""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import hermes_atropos
from hermes_atropos.testing import ScriptedServer, tool_call

RECORD = Path("build/demo.jsonl")

REPLIES = [
    "<think>First I need the numbers.</think>" + tool_call("terminal", command="cat sales.csv"),
    # a brace is missing
    '<tool_call>\n{"name": "write_file", "arguments": {"path": "total.txt", "content": "60\\n"}\n</tool_call>',
    tool_call("write_file", path="total.txt", content="60\n"),
    tool_call("terminal", command="wc -l sales.csv && cat total.txt"),
    "The three sales add up to 60, and total.txt says so.",
]


async def main() -> None:
    hermes_atropos.use_training_profile()  # before Hermes is imported: nothing of the user's own Hermes is touched
    server = ScriptedServer(REPLIES)
    agent = hermes_atropos.AtroposAIAgent(server=server, enabled_toolsets=["terminal", "file"], quiet_mode=True)
    async with agent.task("demo") as task:
        await task.write_file("sales.csv", "north,10\nsouth,20\nwest,30\n")
        result = await task.run("Add up sales.csv and write the total to total.txt.")
        total = await task.terminal("cat total.txt")
    trajectory = result["trajectory"]
    trajectory.metadata["score"] = score = float(total.output.strip() == "60")
    hermes_atropos.write_record(trajectory, RECORD)

    print_steps(trajectory)
    print(f"\nVerifier: total.txt says {total.output.strip()}, so the score is {score}")
    print(f"Stopped: {result['stop_reason']}")
    print_sequence(trajectory)
    print("\nCompared with what the server was sent and sampled:")
    check_prompts(server, trajectory)
    check_ends_of_turns(server, trajectory)
    print(f"\nThe trajectory is in {RECORD}; hermes-atropos view {RECORD} shows it")


def print_steps(trajectory: hermes_atropos.AgentResult) -> None:
    for step in trajectory.steps:
        print(f"\nStep {step.step_number}")
        answers = {answer.call_id: answer for answer in step.tool_results}
        for call in step.tool_calls:
            print(
                f"  calls {call.name} {call.arguments}" if call.error is None else f"  calls, malformed: {call.raw!r}"
            )
            print(f"  hears {answers[call.id].content[:100]!r}")
        if not step.has_tool_calls:
            print(f"  says {step.assistant_message!r}")


def print_sequence(trajectory: hermes_atropos.AgentResult) -> None:
    [sequence] = trajectory.sequences
    sampled = [logprob for logprob, mask in zip(sequence.logprobs, sequence.masked_tokens, strict=True) if mask != -100]
    print(f"Sequence: {len(sequence)} tokens, {sequence.trainable_tokens} of them sampled and trainable,")
    print(f"  with logprobs from {min(sampled)} to {max(sampled)}")


def check_prompts(server: ScriptedServer, trajectory: hermes_atropos.AgentResult) -> None:
    """Each prompt is the last one, what was sampled, and the rendering of the new messages, token by token."""

    def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        return server.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)

    def encode(text: str) -> list[int]:
        return server.tokenizer.encode(text, add_special_tokens=False)

    by_role = itertools.groupby(trajectory.to_messages(), key=lambda message: message["role"] == "assistant")
    new_messages = [list(messages) for is_answer, messages in by_role if not is_answer]
    expected = encode(render(new_messages[0], trajectory.tools))
    for number, request in enumerate(server.requests, start=1):
        assert request.prompt_ids == expected, f"prompt {number} is not what it should be"
        print(f"  prompt {number}: {len(expected)} tokens, as they should be; {len(request.output_ids[0])} sampled")
        if number < len(server.requests):
            expected = [*expected, *request.output_ids[0], *encode("\n" + render(new_messages[number]))]


def check_ends_of_turns(server: ScriptedServer, trajectory: hermes_atropos.AgentResult) -> None:
    """Exactly one end token closes each turn, and the trainer gets what the server has."""
    start, end = server.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    tokens = trajectory.sequences[0].tokens
    assert tokens == server.requests[-1].prompt_ids + server.requests[-1].output_ids[0]
    starts = [place for place, token in enumerate(tokens) if token == start]
    turns = [tokens[begin:following] for begin, following in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    assert [turn.count(end) for turn in turns] == [1] * len(turns)
    print(f"  exactly one <|im_end|> closes each of the {len(turns)} turns of system, user and model")


if __name__ == "__main__":
    asyncio.run(main())
