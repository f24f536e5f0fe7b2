"""TRL's GRPOTrainer teaches the model of the package its errands. The rollouts are Hermes' own, in this process.

    python examples/trl/train.py build/runs/trl --steps 24

Each step asks for the rollouts of an errand, trains on what was sampled in them, and loads the new weights into the
model that samples. Before the first step the trainer's logprobs are compared with those of the sampling.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, DynamicCache, LlamaForCausalLM, LlamaModel, TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl import GRPOConfig, GRPOTrainer

from hermes_atropos.embedded import MODEL, EmbeddedServer
from hermes_atropos.exports.trl import rollout_func, rollout_score
from hermes_atropos.runtime import run_on_portal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "embedded"))

from errands import Errand, Errands, errands

#: How far the trainer's logprob of a token may be from the one that it was sampled with.
DIFFERENCE = 1e-3
#: Rollouts that an evaluation runs at once.
AT_ONCE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="where metrics and weights go")
    parser.add_argument(
        "--checkpoint", type=Path, default=MODEL, help="what is trained; by default the package's model"
    )
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rollouts", type=int, default=16, help="of a step, all of the same errand")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--threads", type=int, default=1, help="that PyTorch computes with, beside the model that samples"
    )
    parser.add_argument("--evaluate", type=int, default=32, help="errands of the evaluation before and after")
    options = parser.parse_args()
    options.run.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)

    run = Run(options)
    before = run.evaluate()
    trainer = GRPOTrainer(
        model=Policy.from_pretrained(options.checkpoint, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(options.checkpoint),
        reward_funcs=rollout_score,
        rollout_func=run.roll_out,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in run.items]),
        callbacks=[run],
        args=GRPOConfig(
            output_dir=str(options.run),
            max_steps=options.steps,
            num_generations=options.rollouts,
            per_device_train_batch_size=options.rollouts,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup",  # Adam's first steps are as large as all others
            warmup_steps=5,
            adam_beta2=0.95,
            beta=0.0,
            seed=options.seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            shuffle_dataset=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    run.load(trainer.model)
    print(f"held-out errands done: {before:.2f} before, {run.evaluate():.2f} after {options.steps} steps", flush=True)


class InProcess(Errands):
    """The errands on the embedded model; each rollout ends as one sequence."""

    server_cls = EmbeddedServer


class Run(TrainerCallback):
    """The environment and the server of a training run, and what is written of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        config, [server] = InProcess.config_init()
        config.group_size, config.extra_sequences = options.rollouts, "longest"
        config.tokenizer_name = server.model_name = str(options.checkpoint)
        self.env = InProcess(config, [server])
        [self.server] = self.env.server.servers
        self.items: dict[str, Errand] = {}
        for item in errands(options.seed):
            self.items.setdefault(item.goal, item)
            if len(self.items) == options.steps:
                break
        self._collect = rollout_func(self.group)
        self._loaded = 0

    async def group(self, prompt: str, count: int) -> Any:
        group, _ = await self.env.collect_trajectories(self.items[prompt])
        return group

    def roll_out(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        """TRL's ``rollout_func``: with the newest weights, and compared with them in the first step."""
        if self._loaded != trainer.state.global_step:
            self.load(trainer.model)
            self._loaded = trainer.state.global_step
        columns = self._collect(prompts, trainer)
        if trainer.state.global_step == 0:
            found = difference(trainer.model, columns)
            self.write({"step": 0, "largest_logprob_difference": found, "rollouts": len(prompts)})
            if found > DIFFERENCE:
                raise SystemExit(
                    f"the trainer's logprobs are not those of the sampling: they differ by up to {found:.2g}"
                )
        return columns

    def load(self, model: Any) -> None:
        """Bring the trainer's weights to the server."""
        folder = self.options.run / "weights"
        model.save_pretrained(folder)
        run_on_portal(lambda: self.server.load_weights(folder))

    def evaluate(self) -> float:
        """The share of held-out errands that are done."""
        places = asyncio.Semaphore(AT_ONCE)

        async def one(item: Errand) -> float:
            async with places:
                return (await self.env.rollout(item))[1]

        async def all_of_them() -> list[float]:
            items = itertools.islice(self.env.eval_items(), self.options.evaluate)
            return await asyncio.gather(*map(one, items))

        scores = run_on_portal(all_of_them)
        self.write({"evaluation": fmean(scores), "errands": len(scores)})
        return fmean(scores)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        self.write({"step": state.global_step, **(logs or {})})

    def write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), flush=True)
        with (self.options.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class SharedPrompt(LlamaModel):
    """The start that rows have in common goes through the model once, and no padding does.

    Most of a row is Hermes' own prompt; and one long row would make all others as long.
    """

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        lengths = mask.sum(1).tolist()
        same = (input_ids == input_ids[:1]).all(0) & mask.bool().all(0)
        start = min(int(same.long().cumprod(0).sum()), min(lengths) - 1)
        if len(input_ids) == 1 or start < 1:
            return super().forward(input_ids, attention_mask=attention_mask, **others)
        shared = super().forward(input_ids[:1, :start], use_cache=True)
        hidden = []
        for ids, length in zip(input_ids, lengths, strict=True):
            cache = DynamicCache()
            for number, layer in enumerate(shared.past_key_values.layers):
                cache.update(layer.keys, layer.values, number)
            own = super().forward(ids[None, start:length], past_key_values=cache, use_cache=True).last_hidden_state[0]
            hidden.append(torch.nn.functional.pad(own, (0, 0, 0, len(ids) - length)))
        start_hidden = shared.last_hidden_state.expand(len(hidden), -1, -1)
        return BaseModelOutputWithPast(last_hidden_state=torch.cat([start_hidden, torch.stack(hidden)], dim=1))


class Policy(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = SharedPrompt(config)


@torch.no_grad()
def difference(model: Any, columns: dict[str, list[Any]]) -> float:
    """The largest difference between the model's logprobs and the recorded ones, over all tokens that are trained."""
    largest = 0.0
    for prompt, completion, logprobs, mask in zip(
        *(columns[name] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask")), strict=True
    ):
        logits = model(torch.tensor([prompt + completion]), logits_to_keep=len(completion) + 1).logits[0, :-1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        trained = torch.tensor(mask, dtype=torch.bool)
        largest = max(largest, float((own - torch.tensor(logprobs)).abs()[trained].max()))
    return largest


if __name__ == "__main__":
    main()
