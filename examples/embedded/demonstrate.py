"""What the model is taught: a careless teacher does errands through Hermes' own loop, and its rollouts are kept.

    python examples/embedded/demonstrate.py build/teach/demonstrations.jsonl --count 1200

The teacher takes the right command most of the time, now and then writes a malformed call, and sometimes does not write
the answer down. So a model that imitates it fails in more than half of its rollouts, for reasons that training can
find: it knows the better choice of each, and is only not sure enough. Where it could not tell, as which of two commands
belongs to which question, training would hardly find out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
from itertools import islice
from pathlib import Path
from typing import Any

from errands import Errand, errands

import hermes_atropos
from hermes_atropos.testing import ScriptedServer, tool_call

#: How often the teacher takes the right command, writes a malformed call, and leaves the answer unwritten.
RIGHT, MALFORMED, UNWRITTEN = 0.7, 0.18, 0.15
AT_ONCE = 16


class Teacher:
    """What the model says in a rollout, as a function of the conversation so far."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.errands: dict[str, Errand] = {}
        self.meant: dict[str, str] = {}

    def __call__(self, messages: list[dict[str, str]]) -> str:
        goal = next(message["content"] for message in messages if message["role"] == "user")
        errand = self.errands[goal]
        heard = re.findall(r'"output": "(.*?)", "exit_code"', messages[-1]["content"])
        wrote = '"bytes_written"' in messages[-1]["content"]
        if wrote:
            return f"The answer is in `{errand.place}`."
        if "is not valid JSON" in messages[-1]["content"]:
            return self.meant.pop(goal)
        if not heard:
            return self.call(goal, "terminal", command=self.command(errand))
        answer = heard[-1].split("\\n")[0].split("=")[-1].strip()
        if self.rng.random() < UNWRITTEN:
            return f"The answer is {answer}."
        return self.call(goal, "write_file", path=errand.place, content=answer)

    def call(self, goal: str, name: str, **arguments: str) -> str:
        right = tool_call(name, **arguments)
        if self.rng.random() >= MALFORMED:
            return right
        self.meant[goal] = right
        return self.rng.choice([right.replace("}}\n</tool_call>", "}\n</tool_call>"), right.replace('"}}', "}}")])

    def command(self, errand: Errand) -> str:
        if self.rng.random() < RIGHT:
            return errand.command
        file = errand.file
        if errand.kind in ("lines", "words"):
            wrong = [f"wc -{flag} < '{file}'" for flag in "lwc"]
        elif errand.kind == "total":
            wrong = [errand.command.replace("-F, ", "")]
            wrong += [re.sub(r"\$\d", f"${column}", errand.command) for column in (1, 2, 3, 4)]
        else:
            wrong = [f"head -n 1 '{file}'", f"tail -n 1 '{file}'"]
        return self.rng.choice([command for command in wrong if command != errand.command])


async def rollouts(count: int, seed: int) -> Any:
    hermes_atropos.use_training_profile()
    teacher = Teacher(seed)
    server = ScriptedServer(teacher)
    agent = hermes_atropos.AtroposAIAgent(server=server, enabled_toolsets=["terminal", "file"], quiet_mode=True)
    places = asyncio.Semaphore(AT_ONCE)

    async def one(errand: Errand) -> Any:
        async with places, agent.task(sandbox="walled") as task:
            await task.write_file(errand.file, errand.text)
            result = await task.run(errand.goal)
        return result["trajectory"]

    chosen = {errand.goal: errand for errand in islice(errands(seed, taught=True), count)}
    teacher.errands.update(chosen)
    return server.tokenizer, await asyncio.gather(*map(one, chosen.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    tokenizer, trajectories = asyncio.run(rollouts(arguments.count, arguments.seed))
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    with arguments.path.open("w") as file:
        for trajectory in trajectories:
            [sequence] = trajectory.sequences
            file.write(json.dumps(segments(tokenizer, sequence)) + "\n")
    print(f"{len(trajectories)} rollouts, {sum(len(t.steps) for t in trajectories)} model calls")


def segments(tokenizer: Any, sequence: Any) -> list[str]:
    """The text of a sequence: what was read and what was said, by turns, beginning with the prompt."""
    pieces: list[list[int]] = [[]]
    sampled = False
    for token, mask in zip(sequence.tokens, sequence.masked_tokens, strict=True):
        if (mask != -100) != sampled:
            sampled = not sampled
            pieces.append([])
        pieces[-1].append(token)
    return [tokenizer.decode(piece) for piece in pieces]


if __name__ == "__main__":
    main()
