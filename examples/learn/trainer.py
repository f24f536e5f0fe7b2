"""A trainer of Atropos' API: GRPO on what the environment samples, new weights into the engine after each step.

Each step draws ``rollouts`` sequences, compares the logprobs that it computes with those recorded at sampling, improves
the policy, writes a checkpoint, and brings that to the engine. The environment goes on sampling meanwhile: what a step
draws was sampled by its own weights or by those of the step before.

    python examples/learn/trainer.py RUN --api http://127.0.0.1:8000 --engine http://127.0.0.1:8001

``learn.py`` starts it, with all that it needs.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import httpx
import torch
from batches import Group, Row, chunks, read, shared
from engines import Engine
from run import FAULT, Run, write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "embedded"))

from llama import Cache, Llama

__all__ = ["Comparison", "Trainer"]

#: How far a logprob may be from the recorded one where both are of the first weights; how far in the mean where both
#: are of the same; and how many standard deviations the sum of what is sampled may be from what the distribution says.
DIFFERENCE, MEAN, SURPRISE = 1e-4, 1e-5, 6.0

#: The largest norm of a gradient, rows that go through the model at once, seconds between two looks for a batch, and
#: the longest sequence.
GRADIENT, AT_ONCE, LOOK, LONGEST = 0.3, 8, 0.3, 16384

#: The first tokens of a prompt among which one is looked for after which the policy is unsure, and draws there.
UNSURE, DRAWS = 64, 128

#: Steps until the learning rate is what it is to be.
WARM_UP = 5

#: The largest ratio that counts for a negative advantage: else one token that became likely again makes up the whole
#: gradient (https://arxiv.org/abs/1912.09729, 5.2).
DUAL = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--api", required=True, help="where run-api listens")
    parser.add_argument("--engine", required=True, help="where the engine listens")
    parser.add_argument("--threads", type=int, default=2, help="that PyTorch computes with")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Run(options.run)
    Trainer(run, Engine(run.settings.engine, options.engine), options.api).train()


class Trainer:
    """Goes on where the run's newest checkpoint is.

    Args:
        run: where checkpoints and figures are written.
        engine: samples for the environment.
        api: the address of Atropos' API.
    """

    def __init__(self, run: Run, engine: Engine, api: str) -> None:
        self._run, self._engine, self.step = run, engine, run.step
        self._api = httpx.Client(base_url=api, timeout=60, trust_env=False)
        self._trained: list[str] = run.state["groups"]
        self._model = Llama.load(run.latest)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
        kept = run.latest / "trainer.pt"
        if kept.exists():
            self._optimizer.load_state_dict(torch.load(kept))
            run.note(run.state["line"])

    def train(self) -> None:
        """Make the steps that are still to be made.

        Raises:
            SystemExit: what was recorded is not what was sampled.
        """
        self._engine.wait()
        while self.step < self._run.settings.steps:
            started = time.monotonic()
            groups = self._draw()
            drawn = time.monotonic()
            line = {"step": self.step, **self._improve(groups)}
            line |= {"seconds_drawing": drawn - started, "seconds_training": time.monotonic() - drawn}
            self._trained += [group.key for group in groups]
            self.step += 1
            self._run.keep(self.step, self._save, {"groups": self._trained, "line": line})
            self._run.note(line)
            self._engine.has(self._run.latest, str(self.step))

    def _save(self, folder: Path) -> None:
        self._model.save(folder, like=self._run.latest)
        torch.save(self._optimizer.state_dict(), folder / "trainer.pt")

    def _draw(self) -> list[Group]:
        """The groups of a step: those that an earlier process drew and did not train, then others.

        The first step has twice as many, so that the comparison is of enough.
        """
        kept = self._run.folder / "drawn.json"
        drawn: list[Any] = json.loads(kept.read_text()) if kept.exists() else []
        wanted = self._run.settings.rollouts * (1 if self.step else 2)
        while True:
            keyed = {read(data).key: data for data in drawn}
            drawn = [data for key, data in keyed.items() if key not in self._trained]
            if sum(len(data["tokens"]) for data in drawn) >= wanted:
                return list(map(read, drawn))
            drawn += self._next_batch()
            write(kept, drawn)

    def _next_batch(self) -> list[Any]:
        while True:
            there = self._engine.has(self._run.latest, str(self.step))  # an engine that was started again has not
            try:
                if there:
                    if self._api.get("/info").raise_for_status().json()["batch_size"] == -1:
                        self._api.post("/register", json=self._registration()).raise_for_status()
                    batch = self._api.get("/batch").raise_for_status().json()["batch"]
                    if batch:
                        return list(batch)
            except httpx.TransportError:
                pass  # learn.py starts the API again
            time.sleep(LOOK)

    def _registration(self) -> dict[str, Any]:
        settings = self._run.settings
        return {
            "wandb_group": "learn",
            "wandb_project": "learn",
            "batch_size": settings.rollouts,
            "max_token_len": LONGEST,
            "checkpoint_dir": str(self._run.folder / "checkpoints"),
            "save_checkpoint_interval": 0,
            "starting_step": self.step,
            "num_steps": settings.steps,
        }

    def _improve(self, groups: Sequence[Group]) -> dict[str, Any]:
        """One step of the optimizer, and its figures."""
        comparison = Comparison(str(self.step))
        count = sum(len(row.places) for group in groups if group.teaches for row in group.rows)
        # Where all scores of a group are the same, only the first step's comparison is of interest.
        rows = [row for group in groups if group.teaches or not self.step for row in group.rows]
        if not self.step:
            comparison.measure(self._model, rows, self._engine)
        self._optimizer.zero_grad()
        clipped = self._gradient(rows, max(count, 1), comparison) if rows else 0
        if fault := comparison.fault():
            print(f"at step {self.step}, what was recorded isn't what was sampled: {fault}", file=sys.stderr)
            raise SystemExit(FAULT)
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), GRADIENT)
        if count:
            rate = self._rate()
            for parameters in self._optimizer.param_groups:
                parameters["lr"] = rate
            self._optimizer.step()
        scores = [score for group in groups for score in group.scores]
        return {
            "reward": fmean(scores),
            "spread": pstdev(scores),
            **{name: fmean(group.metrics[name] for group in groups) for name in groups[0].metrics},
            "rollouts": len(scores),
            "groups": len(groups),
            "groups_trained": sum(group.teaches for group in groups),
            "sequences_a_rollout": len(groups) / len({group.item for group in groups}),
            "tokens": count,
            "clipped": clipped / max(count, 1),
            "gradient": float(norm),
            **comparison.figures(),
        }

    def _rate(self) -> float:
        """The learning rate. Adam's first steps move each weight as far as it may, which at full rate spoils what the
        policy knows; so do large steps in the end, when most groups have nothing left to teach."""
        done = self.step / self._run.settings.steps
        return self._run.settings.learning_rate * min((self.step + 1) / WARM_UP, 1 - 0.9 * done)

    def _gradient(self, rows: Sequence[Row], count: int, comparison: Comparison) -> int:
        """Add up the gradient of ``count`` tokens' mean gain; how many of them are clipped."""
        clipped, clip = 0, self._run.settings.clip
        prompt = read_prompt(self._model, rows)
        # The prompt goes through the model once: the rows' gradients come to copies of its keys and values first.
        copies = [tuple(states.detach().requires_grad_() for states in layer) for layer in prompt]
        for chunk in chunks(rows, AT_ONCE):
            logprobs, *spreads = opinions(self._model, copies, chunk)
            if self.step:
                comparison.add(chunk, logprobs, *spreads)
            advantages, recorded = (
                torch.tensor([value for row in chunk for value in getattr(row, name)], dtype=logprobs.dtype)
                for name in ("advantages", "recorded")
            )
            ratio = torch.exp(logprobs - recorded)
            bounded = torch.clamp(ratio, 1 - clip, 1 + clip)
            gain = torch.minimum(ratio * advantages, bounded * advantages)
            gain = torch.where(advantages < 0, torch.maximum(gain, DUAL * advantages), gain)
            (-gain.sum() / count).backward()
            clipped += int((gain != ratio * advantages).sum())
        torch.autograd.backward(list(chain(*prompt)), [states.grad for states in chain(*copies)])
        return clipped


def read_prompt(model: Llama, rows: Sequence[Row]) -> Cache:
    """The keys and values of the start that all rows share."""
    return model.read(torch.tensor(rows[0].tokens[: shared(rows)]))


def opinions(model: Llama, prompt: Cache, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """What the policy says of the trained tokens, row after row, ``[tokens]`` each.

    Args:
        prompt: the keys and values of the rows' start.

    Returns:
        their logprobs; and of the distributions that they are drawn from the entropy, and the variance of the logprob.
    """
    start = prompt[0][0].shape[2]
    own = [row.tokens[start:] for row in rows]
    length = max(map(len, own))
    ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens in own])
    hidden = model.behind(prompt, ids)
    numbers = [number for number, row in enumerate(rows) for _ in row.places]
    before = [place - 1 - start for row in rows for place in row.places]
    temperatures = torch.tensor([row.temperature for row in rows for _ in row.places], dtype=hidden.dtype)
    logits = model.logits(hidden[numbers, before]) / temperatures[:, None]
    all_logprobs = torch.log_softmax(logits, dim=-1)
    targets = torch.tensor([row.tokens[place] for row in rows for place in row.places])
    return all_logprobs.gather(1, targets[:, None])[:, 0], *spread(all_logprobs.detach())


def spread(all_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Of distributions, ``[count, vocab_size]`` logprobs: the entropies, and the variances of a draw's logprob."""
    weighted = all_logprobs.exp() * all_logprobs
    entropies = -weighted.sum(-1)
    return entropies, (weighted * all_logprobs).sum(-1) - entropies**2


@dataclass
class Comparison:
    """What was recorded at sampling, beside what the policy says now.

    Attributes:
        version: of the policy.
    """

    version: str
    differences: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    surprise: float = 0.0
    variance: float = 0.0

    def measure(self, model: Llama, rows: Sequence[Row], engine: Engine | None = None) -> None:
        """Compare in float64: two float32s differ by up to 1e-4 where attention is almost undecided, and one would not
        know whose error that is.

        Args:
            engine: draws where the policy is least sure, too. A policy that knows its way seldom takes what a server
                leaves out that samples of the most likely tokens alone.
        """
        exact = copy.deepcopy(model).double()
        with torch.no_grad():
            prompt = read_prompt(exact, rows)
            for chunk in chunks(rows, AT_ONCE):
                self.add(chunk, *opinions(exact, prompt, chunk))
            if engine is not None:
                self._draw(exact, rows[0].tokens[:UNSURE], engine)

    def _draw(self, model: Llama, ids: list[int], engine: Engine) -> None:
        hidden = model(torch.tensor(ids[:1]), torch.tensor([ids[1:]]))[0]
        all_logprobs = torch.log_softmax(model.logits(hidden), dim=-1)
        entropies, variances = spread(all_logprobs)
        place = int(entropies.argmax())
        drawn, recorded = engine.draws(ids[: place + 2], DRAWS)
        same = torch.ones(DRAWS, dtype=torch.bool)
        spreads = (each[place].expand(DRAWS) for each in (entropies, variances))
        self._note(recorded, same, all_logprobs[place, drawn], *spreads)

    def add(self, rows: Sequence[Row], logprobs: Tensor, entropies: Tensor, variances: Tensor) -> None:
        """Compare the rows' trained tokens with what :func:`opinions` says of them."""
        versions = [version for row in rows for version in row.versions]
        same = torch.tensor([version == self.version for version in versions])
        self._note([value for row in rows for value in row.recorded], same, logprobs.detach(), entropies, variances)
        self.ages += [int(self.version) - int(version) for version in versions if version and version.isdecimal()]

    def _note(
        self, values: Sequence[float], same: Tensor, logprobs: Tensor, entropies: Tensor, variances: Tensor
    ) -> None:
        recorded = torch.tensor(values, dtype=logprobs.dtype)
        gaps = (logprobs - recorded).abs()
        self.gaps += gaps.tolist()
        self.differences += gaps[same].tolist()
        self.surprise += float((recorded + entropies)[same].sum())
        self.variance += float(variances[same].sum())

    @property
    def deviation(self) -> float:
        """How far the recorded logprobs of this version are, on the whole, from what its distributions would give.

        In standard deviations. Large where the sampler drew from a narrower or wider distribution than it recorded.
        """
        return self.surprise / math.sqrt(self.variance) if self.variance else 0.0

    def figures(self) -> dict[str, Any]:
        return {
            "compared": len(self.differences),
            "difference": max(self.differences, default=None),
            "difference_mean": fmean(self.differences) if self.differences else None,
            "deviation": self.deviation,
            "gap": fmean(self.gaps) if self.gaps else None,
            "gap_largest": max(self.gaps, default=None),
            "age": fmean(self.ages) if self.ages else None,
            "age_largest": max(self.ages, default=None),
        }

    def fault(self) -> str | None:
        """Why what was recorded can't be what was sampled; None if it may be."""
        if self.version == "0" and not self.differences:
            return "the server doesn't tell which weights sampled what"
        largest = max(self.differences, default=0.0)
        if (largest > DIFFERENCE and self.version == "0") or fmean(self.differences or [0.0]) > MEAN:
            return f"logprobs differ by up to {largest:.1e} from the recorded ones, of the same weights"
        if abs(self.deviation) > SURPRISE:
            return (
                f"the tokens' logprobs sum up to {self.deviation:+.1f} standard deviations from what draws would give"
            )
        return None


if __name__ == "__main__":
    main()
