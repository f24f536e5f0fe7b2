"""A group of rollouts by a real model, without a network or a GPU: run it with ``make demo``.

The model is that of the package, of 2.4 million parameters. Hermes' own loop and tools do an errand with names that it
was not taught with, eight times at once, each in a sandbox of its own. A verifier scores the workspaces, and the tokens
that a trainer would get are compared with what the model was sent and sampled.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
import time
from pathlib import Path
from typing import Any

from embedded.errands import Errand, errands, is_done

import hermes_atropos
from hermes_atropos.embedded import EmbeddedServer
from hermes_atropos.errors import SandboxUnavailableError
from hermes_atropos.overview import write_overview
from hermes_atropos.sandbox.wall import try_wall
from hermes_atropos.trajectory import AgentStep

RECORDS, PAGES = Path("build/demo.jsonl"), Path("build/demo")
GROUP_SIZE = 8


class RecordingServer(EmbeddedServer):
    """The model, and what it was sent and sampled: the other side's own books."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[int], list[int], list[float]]] = []

    async def _tokens_and_logprobs_completion_wrapper(self, **arguments: Any) -> Any:
        prompt, outputs, logprobs, reasons = await super()._tokens_and_logprobs_completion_wrapper(**arguments)
        self.calls += [(list(prompt), list(ids), list(values)) for ids, values in zip(outputs, logprobs, strict=True)]
        return prompt, outputs, logprobs, reasons


async def main(number: int) -> None:
    hermes_atropos.use_training_profile()  # before Hermes is imported: nothing of the user's own Hermes is touched
    server = RecordingServer()
    agent = hermes_atropos.AtroposAIAgent(
        server=server, enabled_toolsets=["terminal", "file"], max_iterations=6, max_tokens=160, quiet_mode=True
    )
    agent.suppress_status_output = True
    errand = next(itertools.islice(errands(seed=0), number, None))
    print(f"The errand: {errand.goal}")
    sandbox = sandbox_here()

    began = time.monotonic()
    group = asyncio.gather(*[rollout(agent, errand, sandbox) for _ in range(GROUP_SIZE)])
    while not group.done():
        await asyncio.wait([group], timeout=0.2)
        sampled = sum(len(ids) for _, ids, _ in server.calls)
        said = f"{len(server.calls)} model calls, {sampled} tokens sampled, {time.monotonic() - began:.1f} s"
        if sys.stdout.isatty() or group.done():
            print(f"\r{said}", end="\n" if group.done() else "", flush=True)
    trajectories = await group
    print()

    print_table(trajectories)
    chosen = max(trajectories, key=lambda trajectory: (malformed_calls(trajectory) > 0, trajectory.num_steps))
    print_aloud(trajectories.index(chosen), chosen)
    compare(trajectories, server)
    for number, trajectory in enumerate(trajectories):
        hermes_atropos.write_record(trajectory, RECORDS, append=number > 0)
    print(f"\nThe records are in {RECORDS}; {write_overview(RECORDS, PAGES)} shows them, token by token, in a browser.")


def sandbox_here() -> str:
    """A wall where one can stand."""
    try:
        try_wall()
    except SandboxUnavailableError as error:
        print(f"The model's commands run in a folder, not behind a wall. {error}\n")
        return "folder"
    print("The model's commands run behind a wall: they see their workspace, and nothing else of this machine.\n")
    return "walled"


async def rollout(agent: Any, errand: Errand, sandbox: str) -> hermes_atropos.AgentResult:
    began = time.monotonic()
    async with agent.task(sandbox=sandbox) as task:
        await task.write_file(errand.file, errand.text)
        result = await task.run(errand.goal)
        score = float(await is_done(errand, task))
    trajectory: hermes_atropos.AgentResult = result["trajectory"]
    trajectory.metadata.update(score=score, seconds=round(time.monotonic() - began, 1))
    return trajectory


def malformed_calls(trajectory: hermes_atropos.AgentResult) -> int:
    return sum(call.error is not None for step in trajectory.steps for call in step.tool_calls)


def print_table(trajectories: list[hermes_atropos.AgentResult]) -> None:
    columns = ["rollout", "score", "steps", "malformed calls", "tokens", "sampled", "sequences", "seconds"]
    print("  ".join(columns))
    for number, trajectory in enumerate(trajectories):
        row = [
            number,
            trajectory.metadata["score"],
            trajectory.num_steps,
            malformed_calls(trajectory),
            trajectory.total_tokens,
            sum(sequence.trainable_tokens for sequence in trajectory.sequences),
            len(trajectory.sequences),
            trajectory.metadata["seconds"],
        ]
        print("  ".join(f"{value:>{len(name)}}" for name, value in zip(columns, row, strict=True)))
    mean = sum(trajectory.metadata["score"] for trajectory in trajectories) / len(trajectories)
    print(f"Mean score {mean:.2f}. A trainer learns from the differences within the group.")


def print_aloud(number: int, trajectory: hermes_atropos.AgentResult) -> None:
    print(f"\nRollout {number}, read aloud:")
    for step in trajectory.steps:
        print_step(step)
    print(f"  It says {trajectory.final_response!r}")
    print(f"  and stops: {trajectory.stop_reason}. Score {trajectory.metadata['score']}.")


def print_step(step: AgentStep) -> None:
    answers = {answer.call_id: answer for answer in step.tool_results}
    for call in step.tool_calls:
        said = f"calls {call.name} {call.arguments}" if call.error is None else f"calls, malformed: {call.raw!r}"
        print(f"  {step.step_number}. {said}")
        print(f"     hears {answers[call.id].content[:100]!r}")


def compare(trajectories: list[hermes_atropos.AgentResult], server: RecordingServer) -> None:
    """Each sequence is what the server was sent and sampled, token by token; each sampled token is trainable once."""
    longest = {tuple(prompt + ids): (prompt, ids) for prompt, ids, _ in server.calls}
    trained: list[float] = []
    for trajectory in trajectories:
        for sequence in trajectory.sequences:
            assert tuple(sequence.tokens) in longest, "a sequence is not what the server was sent and sampled"
            masks = sequence.masked_tokens
            assert all(mask in (-100, token) for mask, token in zip(masks, sequence.tokens, strict=True))
            trained += [logprob for logprob, mask in zip(sequence.logprobs, masks, strict=True) if mask != -100]
    sampled = [logprob for _, _, logprobs in server.calls for logprob in logprobs]
    assert sorted(trained) == sorted(sampled), "not every sampled token is trainable once, with its logprob"
    print("\nCompared with what the model was sent and sampled:")
    print(f"  the tokens of all {len(trajectories)} rollouts are those in the model's own books, position by position")
    print(f"  {len(sampled)} tokens were sampled: each is trainable exactly once, with the logprob it was sampled with")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errand", type=int, default=2, help="which one, from 0")
    asyncio.run(main(parser.parse_args().errand))
