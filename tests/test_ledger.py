"""The ledger alone: which turn a list of messages continues, and what its turns become for a trainer."""

from __future__ import annotations

import copy
import json
import math
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hermes_atropos.errors import TokenFidelityError
from hermes_atropos.exports import atropos
from hermes_atropos.exports.atropos import MASK, PROMPT_LOGPROB
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.tokens import BreakCause, FidelityReport, Ledger, Turn

END = 3


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(turn: Turn, text: str = "whatever the harness made of it") -> dict[str, Any]:
    return {"role": "assistant", "content": text, TURN_KEY: turn.ref}


@dataclass
class Model:
    """A model and its server: renders messages as tokens, and keeps a record of its own of every request."""

    ledger: Ledger = field(default_factory=lambda: Ledger(boundaries=[END]))
    requests: list[tuple[list[int], list[int], list[float]]] = field(default_factory=list)

    def tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        rendered: list[int] = []
        for message in messages:
            rendered += [5, *(100 + ord(character) for character in str(message["content"])), END]
        return [*rendered, 6]

    def ask(
        self,
        messages: list[dict[str, Any]],
        *,
        says: str = "yes",
        tools: Any = None,
        cause: BreakCause | None = None,
    ) -> Turn:
        match = self.ledger.locate(messages, tools)
        if match.prompt is not None:
            prompt = match.prompt
        elif match.turn is not None and cause is None:
            prompt = self.ledger.prompt(match, [7, *self.tokens(match.new_messages)])
        else:
            prompt = self.ledger.prompt(match, self.tokens(messages), cause)
        ids = self.ledger.ids(prompt)
        assert len(ids) == prompt.length
        output_ids = [100 + ord(character) for character in says] + [END]
        logprobs = [-(1 + len(self.requests) % 50 + place) / 100 for place in range(len(output_ids))]
        self.requests.append((ids, output_ids, logprobs))
        return self.ledger.record(prompt, output_ids, logprobs, "stop", echo=ids)


def test_a_continued_turn_is_its_very_tokens_and_what_was_appended() -> None:
    model = Model()
    first = model.ask([user("one")], says="uno")
    second = model.ask([user("one"), answer(first), user("two")], says="dos")
    sequence, *others = model.ledger.sequences()
    assert not others
    assert sequence.tokens == [
        *model.requests[0][0],
        *model.requests[0][1],
        7,
        *model.tokens([user("two")]),
        *model.requests[1][1],
    ]
    assert sequence.tokens == model.requests[1][0] + model.requests[1][1] == model.ledger.ids(second)
    assert sequence.turns == [first.ref, second.ref]
    masks, sampled = atropos.masks(sequence), atropos.logprobs(sequence)
    for span, (_, output_ids, logprobs) in zip(sequence.spans, model.requests, strict=True):
        assert masks[span.start : span.end] == output_ids
        assert sampled[span.start : span.end] == logprobs
    trained = {place for span in sequence.spans for place in range(span.start, span.end)}
    for place in set(range(len(sequence.tokens))) - trained:
        assert (masks[place], sampled[place]) == (MASK, PROMPT_LOGPROB)


def test_what_the_harness_made_of_an_answer_does_not_matter_where_its_reference_survived() -> None:
    model = Model()
    first = model.ask([user("one")])
    match = model.ledger.locate([user("one"), answer(first, "something else entirely"), user("two")])
    assert match.turn is first
    assert match.new_messages == [user("two")]
    assert match.history == [user("one"), answer(first, "something else entirely")]


@pytest.mark.parametrize(
    "again",
    [
        {"role": "assistant", "content": "I'll look."},
        {"role": "assistant", "content": "  I'll look.\n"},
        {"role": "assistant", "content": [{"type": "text", "text": "I'll look."}]},
    ],
)
def test_an_answer_without_reference_is_known_by_what_it_says(again: dict[str, Any]) -> None:
    model = Model()
    first = model.ask([user("one")])
    model.ledger.answered(first, {"role": "assistant", "content": "I'll look. "})
    assert model.ledger.locate([user("one"), again, user("two")]).turn is first
    assert model.ledger.locate([user("one"), {"role": "assistant", "content": "I'll not look."}]).turn is None


def test_calls_are_compared_by_name_and_parsed_arguments() -> None:
    def calling(arguments: str, call_id: str) -> dict[str, Any]:
        call = {"id": call_id, "type": "function", "function": {"name": "terminal", "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}

    model = Model()
    first = model.ask([user("one")])
    model.ledger.answered(first, calling('{"command": "ls", "timeout": 1}', "call_1"))
    again = calling('{"timeout":1,"command":"ls"}', "call_2")
    assert model.ledger.locate([user("one"), again, user("two")]).turn is first
    again["tool_calls"][0]["function"]["arguments"] = '{"command": "rm"}'
    assert model.ledger.locate([user("one"), again, user("two")]).turn is None, "altered in place, and not noticed"


def test_white_space_around_other_messages_does_not_matter_and_their_words_do() -> None:
    model = Model()
    first = model.ask([{"role": "system", "content": "Be kind.\n"}, user("one")])
    kept = [{"role": "system", "content": "Be kind."}, user(" one "), answer(first)]
    assert model.ledger.locate([*kept, user("two")]).turn is first
    kept[0] = {"role": "system", "content": "Be brief."}
    match = model.ledger.locate([*kept, user("two")])
    assert match.turn is None
    assert match.cause is BreakCause.HISTORY_REWRITTEN
    assert match.history == []


def test_the_longest_continued_turn_wins() -> None:
    model = Model()
    empty = model.ask([user("one")], says="")
    model.ledger.answered(empty, {"role": "assistant", "content": ""})
    short = model.ask([user("one")], says="I")
    model.ledger.answered(short, {"role": "assistant", "content": "I"})
    longer = model.ask([user("one")], says="I see")
    model.ledger.answered(longer, {"role": "assistant", "content": "I see"})
    messages = [user("one"), {"role": "assistant", "content": "I see"}, user("two")]
    then = model.ask(messages)
    assert then.before is longer
    assert model.ledger.locate([*messages, answer(then), user("three")]).turn is then
    rewritten = [*messages[:2], user("2"), answer(then), user("three")]
    assert model.ledger.locate(rewritten).turn is longer, "the turns before what was rewritten still stand"


def test_of_samples_that_say_the_same_the_least_continued_goes_on() -> None:
    model = Model()
    same = {"role": "assistant", "content": "yes"}
    turns = [model.ask([user("one")]) for _ in range(3)]
    for turn in turns:
        model.ledger.answered(turn, same)
    model.ledger.discard(turns[0].ref, "thrown away")
    then = [model.ask([user("one"), same, user(str(number))]) for number in range(3)]
    assert [turn.before for turn in then] == [turns[1], turns[2], turns[1]]
    assert model.ledger.locate([user("one"), same, user("0"), answer(then[0])]).turn is then[0]


def test_a_sample_that_came_later_counts_too() -> None:
    model = Model()
    same = {"role": "assistant", "content": "yes"}
    for _ in range(2):
        model.ledger.answered(model.ask([user("one")]), same)
        model.ask([user("one"), same, user(str(len(model.requests)))])
    assert [turn.before for turn in model.ledger.turns] == [None, model.ledger.turns[0], None, model.ledger.turns[2]]


def test_other_conversations_are_no_breaks_and_rewritten_ones_are() -> None:
    model = Model()
    system = {"role": "system", "content": "Be kind."}
    first = model.ask([system, user("task")])
    assert first.prompt.cause is BreakCause.FIRST
    subagent = model.ask([{"role": "system", "content": "You are a subagent."}, user("part of the task")])
    assert subagent.prompt.cause is BreakCause.FIRST
    compressed = model.ask([system, user("task"), user("What happened so far: …")])
    assert compressed.prompt.cause is BreakCause.HISTORY_REWRITTEN
    summary = model.ask([system, user("summary of the task"), answer(first), user("go on")])
    assert summary.prompt.cause is BreakCause.HISTORY_REWRITTEN
    report = model.ledger.report()
    assert report.breaks == {BreakCause.HISTORY_REWRITTEN: 2}
    assert report.sequences == 4


def test_other_tools_are_another_prompt() -> None:
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "terminal"}}]
    model = Model()
    first = model.ask([user("one")], tools=tools)
    conversation = [user("one"), answer(first), user("two")]
    assert model.ledger.locate(conversation, copy.deepcopy(tools)).turn is first
    assert model.ledger.locate(conversation, None).cause is BreakCause.HISTORY_REWRITTEN
    tools[0]["function"]["name"] = "another"
    assert model.ledger.locate(conversation, tools).turn is None, "altered in place, and not noticed"


def test_rollouts_with_the_same_tools_share_a_copy() -> None:
    tools = [{"type": "function", "function": {"name": "shared"}}]
    kept = [Model().ask([user("one")], tools=copy.deepcopy(tools)).prompt.tools for _ in range(2)]
    assert kept[0] is kept[1]
    assert kept[0] == tools


def test_samples_of_one_prompt_share_it_and_are_no_break() -> None:
    model = Model()
    first, second = (model.ask([user("one")], says=says) for says in ("a", "b"))
    assert first.prompt is second.prompt
    then = [model.ask([user("one"), answer(turn), user("two")]) for turn in (second, first)]
    assert [sequence.turns for sequence in model.ledger.sequences()] == [
        [first.ref, then[1].ref],
        [second.ref, then[0].ref],
    ]
    assert model.ledger.report().breaks == {}


def test_a_prompt_that_was_asked_at_once_twice_is_one_prompt() -> None:
    ledger = Ledger()
    located = [ledger.locate([user("one")]) for _ in range(2)]
    first, second = (ledger.prompt(match, [1, 2]) for match in located)
    assert first is second


def test_a_turn_that_two_streams_run_through_is_trained_in_the_first_alone() -> None:
    model = Model()
    root = model.ask([user("one")], says="root")
    model.ask([user("one"), answer(root), user("two")])
    model.ask([user("one"), answer(root), user("three")])
    left, right = model.ledger.sequences()
    start, stop = left.spans[0].start, left.spans[0].end
    assert atropos.masks(left)[start:stop] == model.requests[0][1]
    assert right.tokens[start:stop] == model.requests[0][1]
    assert atropos.masks(right)[start:stop] == [MASK] * (stop - start)
    assert atropos.logprobs(right)[start:stop] == [PROMPT_LOGPROB] * (stop - start)
    assert model.ledger.report().breaks == {BreakCause.HISTORY_REWRITTEN: 1}


@pytest.mark.parametrize("cause", [BreakCause.TEMPLATE, BreakCause.UNPROVABLE, BreakCause.TRUNCATED])
def test_a_stream_that_could_not_be_continued_starts_anew_and_trains_nothing_twice(cause: BreakCause) -> None:
    model = Model()
    first = model.ask([user("one")])
    second = model.ask([user("one"), answer(first), user("two")], cause=cause)
    third = model.ask([user("one"), answer(first), user("two"), answer(second), user("three")])
    assert second.prompt.parent is first
    assert second.before is None
    assert third.before is second
    assert [sequence.turns for sequence in model.ledger.sequences()] == [[first.ref], [second.ref, third.ref]]
    assert model.ledger.report().breaks == {cause: 1}
    assert_trained_once(model)


def test_a_discarded_answer_is_kept_marked_and_left_out_unless_asked_for() -> None:
    model = Model()
    attempt = model.ask([user("one")], says="bad")
    model.ledger.discard(attempt.ref, "the harness resampled it")
    model.ask([user("one")], says="good")
    (sequence,) = model.ledger.sequences()
    assert atropos.masks(sequence)[sequence.spans[0].start : sequence.spans[0].end] == model.requests[1][1]
    assert len(model.ledger.sequences(include_discarded=True)) == 2
    report = model.ledger.report()
    assert (report.tokens_sampled, report.tokens_trained, report.tokens_discarded) == (9, 5, 4)
    assert report.left_out == ["turn 0 (4 tokens): the harness resampled it"]
    assert report.breaks == {}


def test_a_discarded_answer_in_the_middle_of_a_stream_stays_there_masked() -> None:
    model = Model()
    first = model.ask([user("one")])
    second = model.ask([user("one"), answer(first), user("two")])
    model.ledger.discard(first.ref, "not wanted")
    (sequence,) = model.ledger.sequences()
    assert sequence.tokens == model.requests[1][0] + model.requests[1][1]
    assert set(atropos.masks(sequence)[: sequence.spans[1].start]) == {MASK}
    model.ledger.discard(second.ref, "not wanted either")
    assert model.ledger.sequences() == []
    assert model.ledger.report().sequences == 0


def test_a_stream_ends_before_its_discarded_end() -> None:
    model = Model()
    first = model.ask([user("one")])
    second = model.ask([user("one"), answer(first), user("two")])
    model.ledger.discard(second.ref, "thrown away")
    (sequence,) = model.ledger.sequences()
    assert sequence.turns == [first.ref]
    assert sequence.tokens == model.requests[0][0] + model.requests[0][1]


@pytest.mark.parametrize(
    ("output_ids", "logprobs", "echo", "position", "expected", "found"),
    [
        ([8, 9], [-0.1], None, None, 2, 1),
        ([8, 1000], [-0.1, -0.1], None, 1, "int below 1000", 1000),
        ([8, -1], [-0.1, -0.1], None, 1, "int below 1000", -1),
        ([8.0, 9], [-0.1, -0.1], None, 0, "int below 1000", 8.0),
        ([8, True], [-0.1, -0.1], None, 1, "int below 1000", True),
        ([8, 9], [-0.1, 0.5], None, 1, "<= 0", 0.5),
        ([8, 9], [-0.1, PROMPT_LOGPROB], None, 1, "<= 0", PROMPT_LOGPROB),
        ([8, 9], [-math.inf, -0.1], None, 0, "<= 0", -math.inf),
        ([8, 9], [-0.1, None], None, 1, "<= 0", None),
        ([8, 9], [-0.1, -0.1], [1, 2], None, 3, 2),
        ([8, 9], [-0.1, -0.1], [1, 2, 4], 2, 3, 4),
    ],
)
def test_what_does_not_fit_is_refused_kept_and_never_trained(
    output_ids: list[Any], logprobs: list[Any], echo: list[int] | None, position: Any, expected: Any, found: Any
) -> None:
    ledger = Ledger(vocab_size=1000)
    prompt = ledger.prompt(ledger.locate([user("one")]), [1, 2, 3])
    ledger.record(prompt, [4], [-0.5])
    with pytest.raises(TokenFidelityError) as refusal:
        ledger.record(prompt, output_ids, logprobs, echo=echo)
    assert (refusal.value.turn, refusal.value.position) == (1, position)
    assert (refusal.value.expected, refusal.value.found) == (expected, found)
    kept = ledger.turns[1]
    assert kept.fault == str(refusal.value)
    assert kept.metadata["rejected"]["output_ids"] == output_ids
    for include_discarded in (False, True):
        assert [sequence.turns for sequence in ledger.sequences(include_discarded)] == [[ledger.turns[0].ref]]
    report = ledger.report()
    assert report.mismatches == 1
    assert report.tokens_sampled == report.tokens_trained + report.tokens_discarded == 1 + len(output_ids)
    assert report.left_out == [f"turn 1 ({len(output_ids)} tokens): {refusal.value}"]


def test_nan_is_no_logprob() -> None:
    ledger = Ledger()
    prompt = ledger.prompt(ledger.locate([user("one")]), [1])
    with pytest.raises(TokenFidelityError, match="finite"):
        ledger.record(prompt, [1], [math.nan])


def test_an_answer_without_a_token_makes_no_sequence() -> None:
    ledger = Ledger()
    turn = ledger.record(ledger.prompt(ledger.locate([user("one")]), [1]), [], [], "length")
    assert ledger.sequences() == []
    then = ledger.record(ledger.prompt(ledger.locate([user("one"), answer(turn), user("two")]), [2]), [4], [-0.1])
    assert [sequence.turns for sequence in ledger.sequences()] == [[turn.ref, then.ref]]


def test_the_rounding_of_a_certain_token_is_no_violation() -> None:
    ledger = Ledger()
    turn = ledger.record(ledger.prompt(ledger.locate([user("one")]), [1]), [4, 5], [3e-6, 0])
    assert turn.logprobs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("alter", [list.clear, list.pop, lambda ids: ids.append(8)])
def test_a_list_that_was_handed_out_and_cut_or_lengthened_does_no_harm(alter: Callable[[list[int]], Any]) -> None:
    model = Model()
    first = model.ask([user("one")])
    alter(model.ledger.ids(first))
    alter(model.ledger.ids(first.prompt))
    model.ask([user("one"), answer(first), user("two")])
    appended = [7, *model.tokens([user("two")])]
    assert model.requests[1][0] == [*model.tokens([user("one")]), *model.requests[0][1], *appended]


def test_turn_sequences_train_each_turn_alone() -> None:
    model = Model()
    first = model.ask([user("one")])
    model.ask([user("one"), answer(first), user("two")])
    for sequence, (prompt_ids, output_ids, logprobs) in zip(model.ledger.turn_sequences(), model.requests, strict=True):
        assert sequence.tokens == prompt_ids + output_ids
        assert atropos.masks(sequence) == [MASK] * len(prompt_ids) + output_ids
        assert atropos.logprobs(sequence) == [PROMPT_LOGPROB] * len(prompt_ids) + logprobs


def test_reports_add_up() -> None:
    model = Model()
    first = model.ask([user("one")])
    model.ask([user("one"), answer(first), user("two")], cause=BreakCause.TEMPLATE)
    model.ledger.discard(first.ref, "thrown away")
    one = model.ledger.report()
    both = sum([one, one], FidelityReport())
    assert both.turns == 2 * one.turns
    assert both.sequences == 2 * one.sequences
    assert both.breaks == {cause: 2 * count for cause, count in one.breaks.items()}
    assert both.tokens_sampled == 2 * one.tokens_sampled
    assert both.left_out == one.left_out * 2


def test_a_conversation_of_thousands_of_turns() -> None:
    model = Model()
    messages = [user("one")]
    for _ in range(1200):
        messages += [answer(model.ask(messages)), user("go on")]
    (sequence,) = model.ledger.sequences()
    assert sequence.tokens == model.requests[-1][0] + model.requests[-1][1]
    assert len(repr(model.ledger.turns[-1])) < 1000


def test_memory_grows_with_what_is_new_though_every_prompt_is_another() -> None:
    def peak(turns: int) -> int:
        tracemalloc.start()
        ledger = Ledger(boundaries=[END])
        body: list[int] = []
        messages: list[dict[str, Any]] = []
        for number in range(turns):
            messages.append(user(f"message {number}"))
            body += [*range(1000 * number + 10, 1000 * number + 510), END]
            rewritten = [{"role": "system", "content": f"turn {number}"}, *messages]
            prompt = ledger.prompt(ledger.locate(rewritten), [number + 10, END, *body])
            ledger.record(prompt, [4, END], [-0.1, -0.1])
        del body, messages, rewritten, prompt
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(ledger.sequences()) == turns
        return held

    peak(160)  # the objects of token ids, which all ledgers share, are made once
    assert peak(160) < 3 * peak(80), "twice the turns are four times the tokens sent, and twice what was new"


# A harness at random: each step picks a conversation that it has, does something to it, and asks.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["go on", "go on", "go on", "resample", "rewrite", "cut off", "break", "other tools", "discard"]
        ),
        st.integers(0, 10**6),
        st.sampled_from(["", " ", "a", "ab", "a b\n", "naïve 🙂", '{"x": 1}']),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=300)
@given(STEPS)
def test_whatever_a_harness_does_the_trainer_gets_what_was_sent_and_sampled_once(steps: list[Any]) -> None:
    model = Model()
    conversations: list[tuple[list[dict[str, Any]], Any]] = [([user("task")], None)]
    for action, choice, text in steps:
        messages, tools = conversations[choice % len(conversations)]
        messages = copy.deepcopy(messages)
        cause = None
        if action == "go on":
            messages.append(user(text))
        elif action == "rewrite":
            messages[choice % len(messages)] |= {"content": text} if choice % 2 else user(text)
        elif action == "cut off":
            messages = [*messages[: 1 + choice % len(messages)], user(text)]
        elif action == "break":
            messages.append(user(text))
            cause = [BreakCause.TEMPLATE, BreakCause.UNPROVABLE, BreakCause.TRUNCATED][choice % 3]
        elif action == "other tools":
            tools = [{"name": text}]
        elif action == "discard" and model.ledger.turns:
            model.ledger.discard(model.ledger.turns[choice % len(model.ledger.turns)].ref, text)
        turn = model.ask(messages, says=text, tools=tools, cause=cause)
        model.ledger.answered(turn, {"role": "assistant", "content": text})
        kept = answer(turn) if choice % 3 else {"role": "assistant", "content": f" {text}"}
        conversations.append(([*messages, kept], tools))
    assert_trained_once(model)


def assert_trained_once(model: Model) -> None:
    """The ledger's sequences against the server's own record of its requests."""
    turns = model.ledger.turns
    assert len(turns) == len(model.requests)
    for turn, (prompt_ids, output_ids, _) in zip(turns, model.requests, strict=True):
        assert model.ledger.ids(turn) == prompt_ids + output_ids
    trained: dict[str, int] = {}
    for sequence in model.ledger.sequences():
        prompt_ids, output_ids, _ = model.requests[model.ledger.turn(sequence.turns[-1]).number]
        assert sequence.tokens == prompt_ids + output_ids
        masks, values = atropos.masks(sequence), atropos.logprobs(sequence)
        assert len(sequence) == len(sequence.tokens) == len(masks) == len(values)
        masked = set(range(len(sequence.tokens)))
        for ref, span in zip(sequence.turns, sequence.spans, strict=True):
            start, stop = span.start, span.end
            _, output_ids, logprobs = model.requests[model.ledger.turn(ref).number]
            assert sequence.tokens[start:stop] == output_ids
            if masks[start] != MASK:
                assert masks[start:stop] == output_ids
                assert values[start:stop] == logprobs
                trained[ref] = trained.get(ref, 0) + 1
                masked -= set(range(start, stop))
        assert all(masks[place] == MASK for place in masked)
        assert all(values[place] == PROMPT_LOGPROB for place in masked)
    assert trained == {turn.ref: 1 for turn in turns if turn.discarded is None}
    report = model.ledger.report()
    assert report.tokens_sampled == sum(len(output_ids) for _, output_ids, _ in model.requests)
    assert report.tokens_trained + report.tokens_discarded == report.tokens_sampled
    assert report.sequences == len(model.ledger.sequences())
    json.dumps(report.breaks)
