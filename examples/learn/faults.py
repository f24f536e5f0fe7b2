"""What the trainer's comparison says of rollouts, as they are and with one fault planted each, as a table.

    python examples/learn/faults.py

Some faults are planted in what was recorded, others in an engine, and one in the environment's configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import itertools
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from batches import Row, read
from engines import MODEL, Engine, command, environ, free_port
from environment import Learning
from processes import Process
from trainer import Comparison

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "embedded"))

from llama import Llama

from hermes_atropos.embedded import MODEL as CHECKPOINT
from hermes_atropos.exports.atropos import MASK, PROMPT_LOGPROB, from_masks

Data = dict[str, Any]

#: What is done to the embedded engine ahead of its start.
TOP_K = (
    "from dataclasses import replace; from hermes_atropos.embedded import sampler; cut = sampler._cut; "
    "sampler._cut = lambda logprobs, sampling: cut(logprobs, replace(sampling, top_k=3))"
)
RUN = "import runpy; runpy.run_module('hermes_atropos.embedded', run_name='__main__', alter_sys=True)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--sandbox", choices=("walled", "folder"), default="walled")
    parser.add_argument("--items", type=int, default=8, help="rolled out with each engine, eight times each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        Faults(options.engine, options.checkpoint, options.sandbox, options.items, Path(folder)).table()


class Careless(Engine):
    """Brings new weights, and lets the engine keep what it has computed with the old ones."""

    def _post(self, path: str, **body: Any) -> None:
        if path != "/reset_prefix_cache":
            super()._post(path, **body)


class Faults:
    """
    Args:
        engine: which serves the policy.
        checkpoint: of the policy.
        sandbox: of the rollouts.
        items: how many are rolled out with each engine.
        folder: for what is written meanwhile.
    """

    def __init__(self, engine: str, checkpoint: Path, sandbox: str, items: int, folder: Path) -> None:
        self._engine, self._checkpoint, self._sandbox = engine, checkpoint, sandbox
        self._items, self._folder = items, folder
        self._model = Llama.load(checkpoint)

    def table(self) -> None:
        """Print a row for each fault."""
        print("| planted | tokens compared | largest difference | deviation | sequences a rollout | what is said |")
        print("|---|---|---|---|---|---|", flush=True)
        with self._serving() as (engine, url):
            groups = self._rollouts(url, self._items)
            self._row("nothing", groups, engine=engine)
            for name, plant in IN_WHAT_WAS_RECORDED.items():
                self._row(name, [plant(copy.deepcopy(data)) for data in groups])
            updated = self._updated()
            engine.has(updated, "1")
            self._row("nothing, after an update", self._rollouts(url, self._items), updated)
        silent = self._silent(read(groups[0]).rows[0])
        with self._serving() as (engine, url):
            engine.has(silent, "1")
            self._row("nothing, where answers are empty", self._rollouts(url, self._items), silent)
            thrown_away = self._rollouts(url, self._items, discarded_attempts="train")
            self._row("discarded attempts trained, where answers are empty", thrown_away, silent)
        with self._serving() as (engine, url):
            self._rollouts(url, 1)
            Careless(self._engine, url).has(updated, "1")
            self._row("a stale prefix cache after an update", self._rollouts(url, self._items), updated)
        if self._engine == "embedded":
            with self._serving(TOP_K) as (engine, url):
                self._row("a server that samples with top_k 3", self._rollouts(url, self._items), engine=engine)

    def _row(
        self, planted: str, groups: list[Data], checkpoint: Path | None = None, engine: Engine | None = None
    ) -> None:
        comparison = Comparison("0" if checkpoint is None else "1")
        model = self._model if checkpoint is None else Llama.load(checkpoint)
        comparison.measure(model, [row for group in map(read, groups) for row in group.rows], engine)
        figures = comparison.figures()
        items = {group["group_overrides"]["item"] for group in groups}
        print(
            f"| {planted} | {figures['compared']} | {figures['difference']:.1e} | {figures['deviation']:+.1f} "
            f"| {len(groups) / len(items):.2f} | {comparison.fault() or 'nothing'} |",
            flush=True,
        )

    def _silent(self, row: Row) -> Path:
        """Weights that say nothing in one of five first answers: Hermes throws these away, and asks again."""
        model = Llama.load(self._checkpoint)
        start, end = row.places[0], row.tokens[row.places[-1]]
        ids = torch.tensor(row.tokens[:start])
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)
        while True:
            logprob = torch.log_softmax(model.logits(model(ids[:1], ids[None, 1:])[0, -1]), dim=-1)[end]
            if logprob > math.log(0.2):
                model.save(self._folder / "silent", like=self._checkpoint)
                return self._folder / "silent"
            optimizer.zero_grad()
            (-logprob).backward()
            optimizer.step()

    def _updated(self) -> Path:
        """Other weights, as a step of training might leave them."""
        torch.manual_seed(0)
        model = Llama.load(self._checkpoint)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 1e-3 * torch.randn_like(weight)
        model.save(self._folder / "updated", like=self._checkpoint)
        return self._folder / "updated"

    @contextlib.contextmanager
    def _serving(self, fault: str = "") -> Iterator[tuple[Engine, str]]:
        """An engine, with a fault planted in it if one is given."""
        port = free_port()
        start = command(self._engine, self._checkpoint, port)
        if fault:
            start = [start[0], "-c", f"{fault}; {RUN}", *start[3:]]
        process = Process("engine", lambda: start, self._folder / "engine.log", environ(self._engine))
        engine = Engine(self._engine, f"http://127.0.0.1:{port}")
        try:
            process.watch()
            engine.wait()
            engine.has(self._checkpoint, "0")
            yield engine, f"http://127.0.0.1:{port}"
        finally:
            process.end()

    def _rollouts(self, url: str, count: int, **settings: Any) -> list[Data]:
        """The groups of so many items."""
        config, [server] = Learning.config_init()
        config.tokenizer_name, config.sandbox = str(self._checkpoint), self._sandbox
        config = config.model_copy(update=settings)
        server.base_url, server.model_name = f"{url}/v1", MODEL
        return asyncio.run(rolled_out(Learning(config, [server]), count))


async def rolled_out(env: Learning, count: int) -> list[Data]:
    items = itertools.islice(env.items(), count)
    found = []
    for number, (groups, _) in enumerate(await asyncio.gather(*map(env.collect_trajectories, items))):
        for group in groups if isinstance(groups, list) else [groups]:
            group["group_overrides"]["item"] = number
            found.append(group)
    return found


def shifted(data: Data) -> Data:
    """Masks and logprobs stand one token too far to the right."""
    for tokens, masks, logprobs in zip(data["tokens"], data["masks"], data["inference_logprobs"], strict=True):
        trained = [MASK, *(token if mask != MASK else MASK for token, mask in zip(tokens[1:], masks, strict=False))]
        masks[:], logprobs[:] = trained, [PROMPT_LOGPROB, *logprobs[:-1]]
    return data


def doubled(data: Data) -> Data:
    """The token that ends an answer stands twice, as in a text that was put together of parts."""
    for tokens, masks, logprobs, told in zip(
        data["tokens"], data["masks"], data["inference_logprobs"], data["overrides"], strict=True
    ):
        for span in reversed(from_masks(tokens, masks, logprobs)):
            for values, value in ((tokens, tokens[span.end - 1]), (masks, MASK), (logprobs, PROMPT_LOGPROB)):
                values.insert(span.end, value)
        told["weights"] = [told["weights"][0] | {"start": 0, "end": len(tokens)}]
    return data


def exchanged(data: Data) -> Data:
    """Each answer has the logprobs of the next one, as far as they go."""
    for tokens, masks, logprobs in zip(data["tokens"], data["masks"], data["inference_logprobs"], strict=True):
        spans = from_masks(tokens, masks, logprobs)
        values = [value for span in spans for value in span.logprobs]
        values = values[len(spans[0].logprobs) :] + values[: len(spans[0].logprobs)]
        for place in (place for span in spans for place in range(span.start, span.end)):
            logprobs[place] = values.pop(0)
    return data


IN_WHAT_WAS_RECORDED: dict[str, Callable[[Data], Data]] = {
    "masks shifted by one": shifted,
    "end tokens doubled": doubled,
    "logprobs of another turn": exchanged,
}

if __name__ == "__main__":
    main()
