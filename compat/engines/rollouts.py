"""Rollouts of the three ways in: Hermes' agent, the small one, and a harness that talks to ``ExactManagedServer``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hermes_atropos import AgentConfig, AtroposAgent, ExactManagedServer, SequenceData
from hermes_atropos.testing import Reply, ScriptedServer
from hermes_atropos.testing.tokenizer import CHATML_TEMPLATE, MARKUP_TOKENS, SPECIAL_TOKENS

MAX_TOKENS = 400
TASK = "List the files in the current folder, and add 2 and 3."


@dataclass
class Outcome:
    """What a number of rollouts left.

    Attributes:
        ends: how each ended, and after how many aborts.
        failures: what went wrong.
    """

    sequences: list[SequenceData] = field(default_factory=list)
    ends: list[tuple[str, int]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)

    def add(self, trajectory: Any) -> None:
        self.sequences += trajectory.sequences
        self.ends.append((str(trajectory.stop_reason), trajectory.fidelity.aborts))
        if trajectory.untrainable or str(trajectory.stop_reason) in {"server_error", "error"}:
            self.failures.append(str(trajectory.untrainable or trajectory.error)[:300])
        for step in trajectory.steps:
            for call in step.tool_calls:
                self.calls[str(call.status)] = self.calls.get(str(call.status), 0) + 1


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def terminal(command: str) -> str:
    """Run a command."""
    return "a.txt"


def hermes_agent(server: Any, tokenizer: Any, **options: Any) -> Any:
    from hermes_atropos import AtroposAIAgent  # imports Hermes, which the training profile comes before

    return AtroposAIAgent(
        server=server,
        tokenizer=tokenizer,
        enabled_toolsets=["terminal"],
        quiet_mode=True,
        skip_context_files=True,
        skip_memory=True,
        max_iterations=3,
        **{"max_tokens": MAX_TOKENS, **options},
    )


def small_agent(server: Any, tokenizer: Any, **options: Any) -> AtroposAgent:
    config = AgentConfig(**{"max_steps": 5, "max_tokens": MAX_TOKENS, **options})
    return AtroposAgent(server, tools=[add, terminal], config=config, tokenizer=tokenizer)


async def of_hermes(server: Any, tokenizer: Any, count: int) -> Outcome:
    agent, outcome = hermes_agent(server, tokenizer), Outcome()

    async def one() -> None:
        async with agent.task() as task:
            outcome.add((await task.run(TASK))["trajectory"])

    await asyncio.gather(*(one() for _ in range(count)))
    return outcome


async def of_the_small_agent(server: Any, tokenizer: Any, count: int, **options: Any) -> Outcome:
    agent, outcome = small_agent(server, tokenizer, **options), Outcome()
    for result in await asyncio.gather(*(agent.run(TASK) for _ in range(count))):
        outcome.add(result)
    return outcome


async def of_a_managed_server(server: Any, tokenizer: Any, count: int) -> Outcome:
    """Conversations of six turns, two answers each, the first of which is continued."""
    outcome = Outcome()

    async def one(number: int) -> None:
        managed = ExactManagedServer(server, tokenizer)
        messages: list[Any] = [{"role": "user", "content": f"Task {number}: {TASK}"}]
        for _ in range(6):
            completion = await managed.chat_completion(messages=messages, n=2, max_tokens=MAX_TOKENS)
            messages += [completion.choices[0].message.model_dump(), {"role": "user", "content": "Go on."}]
        decode = managed.backend.renderer.decode
        outcome.sequences += [SequenceData.cut(sequence, decode) for sequence in managed.ledger.sequences()]
        report = managed.ledger.report()
        outcome.ends.append((str(completion.choices[0].finish_reason), report.aborts))
        outcome.failures += report.left_out

    await asyncio.gather(*(one(number) for number in range(count)))
    return outcome


PATHS = {"AtroposAIAgent": of_hermes, "AtroposAgent": of_the_small_agent, "ExactManagedServer": of_a_managed_server}


def make_tokenizer(corpus: Sequence[Path]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 2,000 tokens with the ChatML template of ``hermes_atropos.testing``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2042,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([path.read_text() for path in corpus], trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


async def first_prompts(tokenizer: Any) -> list[list[int]]:
    """What the agents ask first."""
    server = ScriptedServer(lambda _: Reply("Done."), tokenizer=tokenizer)
    for path in PATHS.values():
        await path(server, tokenizer, 1)
    return [request.prompt_ids for request in server.requests]


async def prompts_of_a_group(tokenizer: Any, count: int) -> list[list[int]]:
    """What that many rollouts of one task ask first, each in a sandbox of its own."""
    server = ScriptedServer(lambda _: Reply("Done."), tokenizer=tokenizer)
    await of_hermes(server, tokenizer, count)
    return [request.prompt_ids for request in server.requests]
