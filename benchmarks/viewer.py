"""How long a browser takes to open a rollout of 100,000 tokens, and whether what it then shows is the record.

    python benchmarks/viewer.py            100,000 tokens, opened five times
    python benchmarks/viewer.py --short    10,000 tokens, opened once

The rollout has a branch that leaves it early and an answer that was thrown away. Chromium opens its page from a file,
with an empty profile each time; `ready_s` is from the start of the navigation until what is in sight was painted. Then
the page is used: each token in it is compared with the record, turns are clicked, a word is searched for, the other
sequences are chosen. Needs /usr/bin/chromium and /usr/bin/chromedriver (Debian: chromium, chromium-driver); without
them only the page is made, and the figures say so. The last line printed is one JSON object of the figures.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import random
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hermes_atropos import viewer
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.testing import chatml_tokenizer, tool_call
from hermes_atropos.tokens import Ledger
from hermes_atropos.toolcalls import parse_text
from hermes_atropos.trajectory import AgentResult, AgentStep, ToolResult, read_record, write_record

CHROMIUM, CHROMEDRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1500,950",
]
TEXT = "count lines in this folder then read file number seven; naïve 東京 🙂 </script> <b>&amp; return None"
#: In one tool result alone, half-way.
NEEDLE = "Nadelöhr"

READY = """
const [done] = arguments;
(function look() {
  const {ready} = document.documentElement.dataset;
  ready ? done(ready) : requestAnimationFrame(look);
})();
"""
# What stands in the page, token by token: its class is "m" or "l0" to "l6".
SHOWN = """
return [...document.querySelectorAll(".chunk i")].map(token => [token.className, token.textContent]);
"""
# Where an element stands in its pane, in pixels from the top, once what is in sight was laid out.
PLACE = """
const [pane, selector, done] = arguments;
const measure = () => {
  const box = document.querySelector(selector).getBoundingClientRect();
  done(box.top - document.querySelector(pane).getBoundingClientRect().top);
};
const later = frames => requestAnimationFrame(() => frames ? later(frames - 1) : measure());
later(10);
"""
SEARCH = """
const start = performance.now();
const field = document.querySelector("#search input");
field.value = arguments[0];
field.dispatchEvent(new Event("input"));
const found = document.querySelector("#count").textContent;
document.querySelector("#search").requestSubmit();
document.body.offsetHeight;
return [found, document.querySelector("#count").textContent, performance.now() - start];
"""
CHOOSE = """
const start = performance.now();
document.querySelectorAll("#tabs button")[arguments[0]].click();
document.body.offsetHeight;
return performance.now() - start;
"""


def rollout(count: int) -> AgentResult:
    """A rollout whose first sequence has at least ``count`` tokens, in turns of about 500."""
    dice = random.Random(7)
    tokenizer = chatml_tokenizer()
    ledger = Ledger()

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def prose(words: int) -> str:
        lines = [" ".join(dice.choices(TEXT.split(), k=12)) for _ in range(words // 12)]
        return "\n".join(lines)

    def ask(messages: list[dict[str, Any]], new: str, text: str) -> tuple[str, AgentStep]:
        match = ledger.locate(messages)
        prompt = ledger.prompt(match, encode(new))
        output = encode(f"{text}<|im_end|>")
        turn = ledger.record(prompt, output, [-dice.expovariate(0.7) for _ in output], "stop")
        calls = parse_text(text).calls
        messages.append(
            {"role": "assistant", "content": parse_text(text).content or "", TURN_KEY: turn.ref}
            | ({"tool_calls": [call.to_openai() for call in calls]} if calls else {})
        )
        return turn.ref, AgentStep(len(steps) + 1, f"{text}<|im_end|>", calls, turns=[turn.ref])

    steps: list[AgentStep] = []
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": prose(60)},
        {"role": "user", "content": "How many lines?"},
    ]
    new = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    opening, length, needle = [*messages], 0, NEEDLE
    while length < count:
        new += "<|im_start|>assistant\n"
        text = f"<think>{prose(24)}</think>{prose(24)}\n{tool_call('terminal', command=prose(36))}"
        ref, step = ask(messages, new, text)
        steps.append(step)
        length = len(ledger.ids(ledger.turn(ref)))
        content = prose(60)
        if length > count / 2:
            content, needle = f"{content} {needle}", ""
        call = step.tool_calls[0]
        step.tool_results = [ToolResult("terminal", content, duration_s=0.1, exit_code=0, call_id=call.id)]
        messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
        new = f"\n<|im_start|>user\n<tool_response>\n{content}\n</tool_response><|im_end|>\n"
    new += "<|im_start|>assistant\n"
    unheard, _ = ask([*messages], new, prose(24))
    ledger.discard(unheard, "the harness asked again")
    steps.append(ask(messages, new, "Seven lines.")[1])
    rewritten = [*opening, {"role": "user", "content": "(what came before was summed up) Go on."}]
    steps.append(
        ask(rewritten, f"<|im_start|>user\n{prose(count // 8)}<|im_end|>\n<|im_start|>assistant\n", "Eight.")[1]
    )
    result = AgentResult(True, "Eight.", steps, messages=[*messages, *rewritten[len(opening) :]])
    result.attach_tokens(ledger, lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)))
    return result


class Browser:
    """A Chromium with an empty profile, spoken to through chromedriver (W3C WebDriver)."""

    def __init__(self, session: str) -> None:
        self._session = session

    @classmethod
    @contextlib.contextmanager
    def opened(cls) -> Iterator[Browser]:
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
            subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, text=True) as driver,
        ):
            try:
                assert driver.stdout is not None
                port = next(line.split()[-1].rstrip(".") for line in driver.stdout if "started successfully" in line)
                options = {"binary": str(CHROMIUM), "args": [*QUIET, f"--user-data-dir={profile}"]}
                wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
                root = f"http://127.0.0.1:{port}/session"
                browser = cls(f"{root}/{post(root, wanted)['sessionId']}")
                try:
                    yield browser
                finally:
                    urllib.request.urlopen(urllib.request.Request(browser._session, method="DELETE")).close()
            finally:
                driver.terminate()

    def open(self, page: Path) -> float:
        """Open a page; seconds until what is in sight was painted."""
        post(f"{self._session}/url", {"url": page.as_uri()})
        return float(self.wait(READY)) / 1000

    def wait(self, script: str, *arguments: Any) -> Any:
        """What the script hands to its last argument, a function."""
        return post(f"{self._session}/execute/async", {"script": script, "args": list(arguments)})

    def run(self, script: str, *arguments: Any) -> Any:
        return post(f"{self._session}/execute/sync", {"script": script, "args": list(arguments)})

    def screenshot(self, path: Path) -> None:
        with urllib.request.urlopen(f"{self._session}/screenshot") as answer:
            path.write_bytes(base64.b64decode(json.load(answer)["value"]))


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["value"]


def use(browser: Browser, view: viewer.View, screenshot: Path | None) -> dict[str, float]:
    """Check in the browser that the page is the view and does what it is clicked for; seconds that this took it."""
    check_tokens(browser, view["sequences"][0])
    assert browser.run("return performance.getEntriesByType('resource').length") == 0, "the page loaded something"

    turns = [place for place, message in enumerate(view["messages"]) if message["turn"]]
    for place in (turns[-4], turns[0], turns[len(turns) // 2]):
        browser.run("document.querySelectorAll('article')[arguments[0]].click()", place)
        top = browser.wait(PLACE, "#tokens", ".run.active")
        assert -1 < top < 30, f"the tokens of a turn that was clicked are {top} pixels from the top"
        assert browser.run("return document.querySelector('.run.active').dataset.message") == str(place)
    if screenshot:
        browser.screenshot(screenshot)

    found, shown, search_ms = browser.run(SEARCH, NEEDLE.upper())
    assert (found, shown) == ("2 found", "1 / 2"), "it stands in the conversation once, and once in the tokens"
    browser.run("document.querySelector('#search').requestSubmit()")
    assert 0 < browser.wait(PLACE, "#tokens", ".chunk i.found") < 900, "a token that was found is not in sight"
    marked = browser.run("return [...document.querySelectorAll('i.found')].map(token => token.textContent).join('')")
    assert NEEDLE in marked

    longest = 0.0
    for number, sequence in reversed([*enumerate(view["sequences"])]):
        longest = max(longest, browser.run(CHOOSE, number))
        check_tokens(browser, sequence)
    return {"search_s": search_ms / 1000, "choose_sequence_s": longest / 1000}


def check_tokens(browser: Browser, sequence: viewer.SequenceView) -> None:
    def level(logprob: float | None) -> str:
        return "m" if logprob is None else f"l{sum(logprob < bound for bound in viewer.SCALE)}"

    texts = [text.replace("\n", "⏎\n") for text in sequence["texts"] or ()]
    assert browser.run(SHOWN) == [[level(value), text] for value, text in zip(sequence["logprobs"], texts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="10,000 tokens, one round")
    parser.add_argument("--screenshot", type=Path, help="write a picture of the page to this PNG")
    parser.add_argument("--keep", type=Path, help="write the record and the page to this folder")
    options = parser.parse_args()
    if options.short:
        options.tokens, options.rounds = 10_000, 1
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options, options.keep or Path(folder))
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    record, page = folder / "rollout.jsonl", folder / "rollout.html"
    write_record(rollout(options.tokens), record)
    start = time.perf_counter()
    view = viewer.view(read_record(record), chatml_tokenizer(), title=record.name)
    page.write_text(viewer.to_html(view), "utf-8")
    figures: dict[str, Any] = {
        "tokens": len(view["sequences"][0]["tokens"]),
        "tokens_of_all_sequences": sum(len(sequence["tokens"]) for sequence in view["sequences"]),
        "page_mb": page.stat().st_size / 1e6,
        "make_page_s": time.perf_counter() - start,
        "browser": "none",
    }
    if not (CHROMIUM.exists() and CHROMEDRIVER.exists()):
        print(f"no browser: neither opened nor checked ({CHROMIUM} and {CHROMEDRIVER} are needed)")
        return figures
    ready = []
    for _ in range(options.rounds):
        with Browser.opened() as browser:
            ready.append(browser.open(page))
            print(f"ready after {ready[-1]:.2f} s")
            if len(ready) == options.rounds:
                figures |= use(browser, view, options.screenshot)
                figures["browser"] = browser.run("return navigator.userAgent").rpartition("Chrome/")[2].split()[0]
    return figures | {"ready_s": statistics.median(ready), "ready_max_s": max(ready)}


if __name__ == "__main__":
    main()
