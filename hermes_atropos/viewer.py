"""A recorded rollout to look at: the conversation beside its tokens, in the terminal or as one HTML file."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from itertools import groupby
from textwrap import indent
from typing import Any, TypedDict, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hermes_atropos.errors import NoTokenizerError
from hermes_atropos.messages import TURN_KEY, call_function
from hermes_atropos.rendering.tokenizers import Vocabulary, decode
from hermes_atropos.toolcalls import ToolCall
from hermes_atropos.trajectory import AgentResult, AgentStep, SequenceData, ToolResult
from hermes_atropos.values import common_length

__all__ = ["SCALE", "to_html", "to_terminal", "token_texts", "view"]

#: Logprobs at which the colour changes, from certain to surprising.
SCALE = (-0.01, -0.1, -0.5, -1.0, -2.0, -4.0)
TERMINAL_COLOURS = ("#5fafd7", "#5fd7af", "#87d75f", "#d7d75f", "#ffaf5f", "#ff875f", "#ff5f5f")

# What a terminal could take for a command, or hide: control characters, changes of direction, halves of characters.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class CallView(TypedDict):
    """A tool call: ``arguments`` are (name, text) pairs, or one pair without a name if they are not a JSON object."""

    name: str
    arguments: list[tuple[str, str]]
    status: str
    error: str | None


class MessageView(TypedDict):
    """A message of the conversation; ``note`` says what its tool or its turn came to."""

    role: str
    name: str
    content: str
    reasoning: str
    calls: list[CallView]
    note: str
    failed: bool
    turn: str | None


class RunView(TypedDict):
    """A stretch of tokens, ``[start, end)``: sampled in one turn (``turn``), or read by the model (None).

    ``text`` is what a turn said where the record has it on its own; ``message`` the place of its message.
    """

    start: int
    end: int
    turn: str | None
    message: int | None
    label: str
    discarded: bool
    text: str


class SequenceView(TypedDict):
    """One token stream. ``logprobs`` has None where a token is not trained; ``texts`` is None where unknown."""

    label: str
    notes: list[str]
    discarded: bool
    tokens: list[int]
    logprobs: list[float | None]
    texts: list[str] | None
    text: str
    runs: list[RunView]


class View(TypedDict):
    """All that is shown of a rollout."""

    title: str
    facts: list[tuple[str, str]]
    problems: list[str]
    messages: list[MessageView]
    sequences: list[SequenceView]
    scale: list[float]


def view(result: AgentResult, tokenizer: Any = None, *, title: str = "Rollout") -> View:
    """What there is to see of a rollout.

    The sequences that are trained come first. Those after them hold what the harness threw away, and only that is
    unmasked in them.

    Args:
        tokenizer: the one that the tokens are of, for a rollout without a vocabulary; without either, tokens have ids
            but no texts.

    Raises:
        NoTokenizerError: the tokens are not of this tokenizer.
    """
    messages = list(_messages(result))
    places = {message["turn"]: place for place, message in enumerate(messages) if message["turn"]}
    spoken = {step.turns[-1]: step.assistant_message for step in result.steps if step.turns}
    vocabulary = result.vocabulary or None if tokenizer is None else Vocabulary(tokenizer)
    thrown_away = [sequence for sequence in result.all_sequences if any(map(_thrown_away, _turns(sequence)))]
    labelled = [(f"Sequence {number}", sequence, False) for number, sequence in enumerate(result.sequences, start=1)]
    labelled += [(f"Discarded {number}", sequence, True) for number, sequence in enumerate(thrown_away, start=1)]
    sequences: list[SequenceView] = []
    for label, sequence, discarded in labelled:
        logprobs = _logprobs(sequence, only_discarded=discarded)
        if tokenizer is not None:
            _check_tokenizer(tokenizer, sequence)
        texts = token_texts(vocabulary, sequence.tokens) if vocabulary is not None else None
        sequences.append(
            {
                "label": label,
                "notes": list(_notes(sequence, sequences)),
                "discarded": discarded,
                "tokens": sequence.tokens,
                "logprobs": logprobs,
                "texts": texts,
                "text": sequence.full_text if texts is None else "",
                "runs": _runs(sequence, logprobs, places, spoken),
            }
        )
    return {
        "title": title,
        "facts": list(_facts(result)),
        "problems": list(_problems(result)),
        "messages": messages,
        "sequences": sequences,
        "scale": list(SCALE),
    }


def token_texts(vocabulary: Mapping[int, str | bytes], tokens: Sequence[int]) -> list[str]:
    """The text of each token, [seq_len], of what each says: its text, or its bytes.

    Where several tokens make one character, the first of them has the text and the others are empty.
    """
    texts = [""] * len(tokens)
    for whole, run in groupby(range(len(tokens)), key=lambda place: isinstance(vocabulary[tokens[place]], str)):
        if whole:
            for place in run:
                texts[place] = str(vocabulary[tokens[place]])
            continue
        decoder, began = codecs.getincrementaldecoder("utf-8")("replace"), 0
        for place in run:
            for byte in cast(bytes, vocabulary[tokens[place]]):
                if not decoder.getstate()[0]:
                    began = place
                said = decoder.decode(bytes([byte]))
                texts[began] += said[:1]
                texts[place] += said[1:]  # the byte ended a broken character, and is one itself
                began = place if said else began
        texts[began] += decoder.decode(b"", final=True)
    return texts


def _check_tokenizer(tokenizer: Any, sequence: SequenceData) -> None:
    text = decode(tokenizer, sequence.tokens)
    if text != sequence.full_text:
        place = common_length(text, sequence.full_text)
        raise NoTokenizerError(
            f"the tokens are not of this tokenizer: it makes {text[place : place + 20]!r} of them where the record has "
            f"{sequence.full_text[place : place + 20]!r}; pass the model's own"
        )


def to_html(view: View) -> str:
    """The view as one HTML page that needs no other file and no network."""
    template = resources.files("hermes_atropos").joinpath("viewer.html").read_text("utf-8")
    # ASCII holds every character, halves of surrogate pairs included; without "<" nothing can end the script element.
    data = json.dumps(view, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("{{data}}", data)


def to_terminal(view: View) -> RenderableType:
    """The view for a ``rich`` console: the conversation, the tokens of each turn, and a table of the sequences."""
    heading = Table.grid(padding=(0, 2))
    for name, value in view["facts"]:
        heading.add_row(Text(name, style="dim"), _printable(value))
    parts: list[RenderableType] = [Text(view["title"], style="bold"), heading]
    parts += [_printable(problem, "bold red") for problem in view["problems"]]
    runs = _trained_runs(view["sequences"])
    for message in view["messages"]:
        parts += _message_lines(message, runs.pop(message["turn"] or "", None))
    for sequence, run in runs.values():
        parts += [_heading(sequence["label"], run["label"], failed=run["discarded"]), *_run_lines(sequence, run)]
    if view["sequences"]:
        parts += [Text(), _sequence_table(view["sequences"]), _legend()]
    return Group(*parts)


def _messages(result: AgentResult) -> Iterator[MessageView]:
    steps = {ref: step for step in result.steps for ref in step.turns}
    answers = {answer.call_id: answer for step in result.steps for answer in step.tool_results if answer.call_id}
    calls = {call.id: call for step in result.steps for call in step.tool_calls}
    for message in result.messages:
        ref = message.get(TURN_KEY)
        call, answer = calls.get(message.get("tool_call_id", "")), answers.get(message.get("tool_call_id", ""))
        step = steps.get(ref) if ref else None
        yield {
            "role": str(message.get("role")),
            "name": str(message.get("name") or (call.name if call else "")),
            "content": _text(message.get("content")),
            "reasoning": _text(message.get("reasoning_content") or message.get("reasoning")),
            "calls": _calls(message, step),
            "note": _answer_note(answer, call) if message.get("role") == "tool" else _step_note(step, ref),
            "failed": bool((answer and not answer.success) or (call and not call.ok)),
            "turn": ref,
        }


def _calls(message: Mapping[str, Any], step: AgentStep | None) -> list[CallView]:
    """The message's calls as it has them, and those attempts of its step that stand in its text."""
    found: list[CallView] = []
    known = {call.id: call for call in step.tool_calls} if step else {}
    for written in message.get("tool_calls") or ():
        function = call_function(written)
        call = known.pop(written.get("id"), None)
        found.append(
            {
                "name": str(function.get("name")),
                "arguments": _arguments(function.get("arguments")),
                "status": call.status if call else "",
                "error": call.error if call else None,
            }
        )
    for call in known.values():
        if not call.ok and call.raw and call.raw in _text(message.get("content")):
            arguments = _arguments(call.arguments) if call.arguments else []
            found.append({"name": call.name, "arguments": arguments, "status": call.status, "error": call.error})
    return found


def _arguments(arguments: Any) -> list[tuple[str, str]]:
    decoded = arguments
    if isinstance(arguments, str):
        try:
            decoded = json.loads(arguments)
        except (ValueError, RecursionError):
            decoded = None
    if not isinstance(decoded, dict):
        return [("", _text(arguments))]
    return [(str(name), _text(value)) for name, value in decoded.items()]


def _text(value: Any) -> str:
    """Content of any kind as text."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text")) for part in value)
    return json.dumps(value, ensure_ascii=False, indent=1, default=str)


def _answer_note(answer: ToolResult | None, call: ToolCall | None) -> str:
    notes = [] if call is None or call.ok else [f"answers an attempt: {call.status}"]
    if answer is not None:
        notes += [] if notes else ["ok" if answer.success else f"failed: {answer.error}"]
        notes += [] if answer.exit_code is None else [f"exit code {answer.exit_code}"]
        notes += [] if answer.duration_s is None else [f"{answer.duration_s:.3g} s"]
        notes += [] if answer.overflow is None else [f"the whole of it is in {answer.overflow}"]
    return " · ".join(notes)


def _step_note(step: AgentStep | None, ref: str | None) -> str:
    if step is None or ref is None:
        return ""
    notes = [f"step {step.step_number}"]
    if len(step.turns) > 1:
        notes.append(f"attempt {step.turns.index(ref) + 1} of {len(step.turns)}")
    if step.reward is not None and ref == step.turns[-1]:
        notes.append(f"reward {step.reward:g}")
    return " · ".join(notes)


def _turns(sequence: SequenceData) -> list[dict[str, Any]]:
    """The turns of a sequence; one that does not name them has a turn for each span."""
    unnamed = [{"ref": None, "start": span.start, "end": span.end} for span in sequence.spans]
    return list(sequence.metadata.get("turns", unnamed))


def _thrown_away(turn: Mapping[str, Any]) -> bool:
    return turn.get("discarded") is not None


def _logprobs(sequence: SequenceData, *, only_discarded: bool) -> list[float | None]:
    """None where a token is not trained or, if asked, was not thrown away."""
    logprobs: list[float | None] = [None] * len(sequence)
    for span in sequence.spans:
        if span.trained:
            logprobs[span.start : span.end] = span.logprobs
    for turn in _turns(sequence):
        if only_discarded and not _thrown_away(turn):
            logprobs[turn["start"] : turn["end"]] = [None] * (turn["end"] - turn["start"])
    return logprobs


def _runs(
    sequence: SequenceData, logprobs: Sequence[float | None], places: Mapping[str, int], spoken: Mapping[str, str]
) -> list[RunView]:
    runs: list[RunView] = []
    end = 0

    def read_until(place: int) -> None:
        if end < place:
            label = f"read: {place - end:,} tokens"
            runs.append(RunView(start=end, end=place, turn=None, message=None, label=label, discarded=False, text=""))

    for turn in _turns(sequence):
        read_until(turn["start"])
        start, end = turn["start"], turn["end"]
        shown = [logprob for logprob in logprobs[start:end] if logprob is not None]
        facts = [f"sampled: {end - start:,} tokens", turn.get("finish_reason")]
        if shown:
            facts.append(f"mean logprob {sum(shown) / len(shown):.3f}")
        if _thrown_away(turn):
            facts.append(f"discarded: {turn['discarded']}")
        elif start < end and not shown:
            facts.append("trained in another sequence")
        ref = turn["ref"] or ""
        label, text = " · ".join(filter(None, facts)), spoken.get(ref, "")
        message, lost = places.get(ref), _thrown_away(turn)
        runs.append(RunView(start=start, end=end, turn=ref, message=message, label=label, discarded=lost, text=text))
    read_until(len(sequence))
    return runs


def _notes(sequence: SequenceData, earlier: Sequence[SequenceView]) -> Iterator[str]:
    """What sets a sequence apart from those before it."""
    shared = max(earlier, key=lambda other: common_length(other["tokens"], sequence.tokens), default=None)
    if shared is not None:
        yield f"leaves {shared['label']} after {common_length(shared['tokens'], sequence.tokens):,} tokens"
    causes = {turn.get("cause") for turn in _turns(sequence)} - {None, "first"}
    yield from (f"a new stream: {str(cause).replace('_', ' ')}" for cause in causes)
    yield from (f"discarded: {turn['discarded']}" for turn in _turns(sequence) if _thrown_away(turn))


def _facts(result: AgentResult) -> Iterator[tuple[str, str]]:
    yield "outcome", f"{result.stop_reason}{' (success)' if result.success else ''}"
    malformed = sum(step.malformed_calls for step in result.steps)
    calls = f"{result.total_tool_calls} tool calls ({malformed} malformed, {result.tool_errors} failed)"
    yield "steps", f"{result.num_steps}, {calls}"
    if (report := result.fidelity) is not None:
        yield (
            "tokens",
            f"{report.tokens_sampled:,} sampled in {report.turns} turns: {report.tokens_trained:,} trained, "
            f"{report.tokens_discarded:,} discarded",
        )
        breaks = ", ".join(f"{count} × {str(cause).replace('_', ' ')}" for cause, count in report.breaks.items())
        yield "sequences", f"{report.sequences}; breaks: {breaks or 'none'}"
    elif not result.tracked:
        yield "tokens", "none: the server returns no token ids"
    for name, values in (("sampling", result.sampling), ("packages", result.packages), ("metadata", result.metadata)):
        if values:
            yield name, ", ".join(f"{key} {_text(value)}" for key, value in values.items())


def _problems(result: AgentResult) -> Iterator[str]:
    if result.error:
        yield f"error: {result.error}"
    if result.untrainable:
        yield f"must not be trained on: {result.untrainable}"
    if result.fidelity is not None:
        yield from (f"left out: {reason}" for reason in result.fidelity.left_out)


# ── The terminal ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _printable(text: str, style: str = "") -> Text:
    return Text(UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], text), style=style)


def _heading(*parts: str, failed: bool = False) -> Text:
    return _printable(f"\n── {' · '.join(filter(None, parts))}", "bold red" if failed else "bold")


def _trained_runs(sequences: Sequence[SequenceView]) -> dict[str, tuple[SequenceView, RunView]]:
    """Where each turn is trained or, of those thrown away, would be."""
    return {
        run["turn"] or f"{sequence['label']}@{run['start']}": (sequence, run)
        for sequence in sequences
        for run in sequence["runs"]
        if run["turn"] is not None
        and any(value is not None for value in sequence["logprobs"][run["start"] : run["end"]])
    }


def _message_lines(message: MessageView, place: tuple[SequenceView, RunView] | None) -> Iterator[RenderableType]:
    where = (place[0]["label"], place[1]["label"]) if place else ()
    yield _heading(message["role"], message["name"], message["note"], *where, failed=message["failed"])
    exact = place is not None and place[0]["texts"] is not None
    if place is not None and exact:
        yield from _run_lines(*place)
    else:
        texts = [(message["reasoning"], "dim italic"), (message["content"], "")]
        yield from (_printable(text, style) for text, style in texts if text)
    for call in message["calls"]:
        faulty = call["status"] not in ("", "ok")
        if faulty:
            yield _printable(f"→ {call['name'] or '(no name)'} [{call['status']}] {call['error']}", "red")
        elif not exact:
            yield _printable(f"→ {call['name']}", "cyan")
            for name, text in call["arguments"]:
                yield _printable(indent(f"{name}: {text}" if name else text, "    "))


def _run_lines(sequence: SequenceView, run: RunView) -> Iterator[RenderableType]:
    """What a turn sampled, coloured token by token where their texts are known."""
    if sequence["texts"] is None:
        yield _printable(run["text"] or "(pass --tokenizer to read it)")
        return
    line = Text()
    for position in range(run["start"], run["end"]):
        logprob = sequence["logprobs"][position]
        colour = "dim" if logprob is None else TERMINAL_COLOURS[sum(logprob < bound for bound in SCALE)]
        line.append_text(_printable(sequence["texts"][position], colour))
    yield line


def _sequence_table(sequences: Sequence[SequenceView]) -> Table:
    table = Table("sequence", "tokens", "trainable", "mean logprob", "notes", box=None, header_style="dim")
    for sequence in sequences:
        trained = [value for value in sequence["logprobs"] if value is not None]
        table.add_row(
            sequence["label"],
            f"{len(sequence['tokens']):,}",
            f"{0 if sequence['discarded'] else len(trained):,}",
            f"{sum(trained) / len(trained):.3f}" if trained else "",
            _printable("; ".join(sequence["notes"])),
        )
    return table


def _legend() -> Text:
    labels = [Text(f"{bound:g}", colour) for bound, colour in zip((0.0, *SCALE), TERMINAL_COLOURS, strict=True)]
    return Text("logprob up to  ", "dim").append_text(Text("  ").join(labels))
