"""What the viewer shows is the record: every token, each in its place; and no text of a record gets out of the page."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, Family
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hermes_atropos import AtroposAgent
from hermes_atropos.errors import NoTokenizerError
from hermes_atropos.messages import TURN_KEY
from hermes_atropos.rendering.tokenizers import Vocabulary
from hermes_atropos.testing import ScriptedServer, chatml_tokenizer, tool_call
from hermes_atropos.tokens import Ledger
from hermes_atropos.toolcalls import parse_text, validate
from hermes_atropos.trajectory import AgentResult, AgentStep, SequenceData, ToolResult, read_record, write_record
from hermes_atropos.viewer import View, to_html, token_texts, view

TOKENIZER = chatml_tokenizer()
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def text_of(ids: list[int], tokenizer: Any = TOKENIZER) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Rollout:
    """A rollout that is written answer by answer: its ledger, messages and steps."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.messages: list[dict[str, Any]] = [{"role": "user", "content": "How many files?"}]
        self.steps: list[AgentStep] = []

    def ask(self, new: str, answer: str, *, lost: str | None = None) -> str:
        """The model reads ``new`` and answers; ``lost`` is why the harness threw that away."""
        prompt = self.ledger.prompt(self.ledger.locate(self.messages), TOKENIZER.encode(new))
        output = TOKENIZER.encode(answer)
        turn = self.ledger.record(prompt, output, [-(place % 50) / 10 for place in range(len(output))], "stop")
        if lost is not None:
            self.ledger.discard(turn.ref, lost)
            return turn.ref
        said = parse_text(answer)
        calls = validate(said.calls, [LOOK])
        faulty = [call.raw for call in calls if not call.ok]
        message = {"role": "assistant", "content": "\n".join([said.content or "", *faulty]), TURN_KEY: turn.ref}
        self.messages.append(
            message
            | {"reasoning_content": said.reasoning}
            | {"tool_calls": [call.to_openai() for call in calls if call.ok]}
        )
        self.steps.append(AgentStep(len(self.steps) + 1, answer, calls, turns=[turn.ref]))
        return turn.ref

    def answer(self, content: str, **known: Any) -> None:
        """The tools' answer to the last call."""
        call = self.steps[-1].tool_calls[-1]
        self.steps[-1].tool_results.append(ToolResult(call.name, content, call_id=call.id, **known))
        self.messages.append({"role": "tool", "tool_call_id": call.id, "content": content})

    def result(self) -> AgentResult:
        result = AgentResult(True, "Two.", self.steps, messages=self.messages)
        result.attach_tokens(self.ledger, text_of, Vocabulary(TOKENIZER))
        return result


def conversation(*, lost: str | None = None) -> Rollout:
    """A malformed call, a call, an answer; ``lost`` is an answer that the harness threw away before."""
    rollout = Rollout()
    rollout.ask("user: How many files?", "<think>I look.</think><tool_call>{look}</tool_call>")
    rollout.answer("That is no JSON.", success=False, error="no JSON")
    rollout.ask("tool: That is no JSON.", f"Again.\n{tool_call('look', folder='/srv', depth=2)}")
    rollout.answer("a b", exit_code=0, duration_s=0.25)
    if lost is not None:
        rollout.ask("tool: a b", lost, lost="the harness asked again")
    rollout.ask("tool: a b", "Two.")
    return rollout


@functools.cache
def branched() -> AgentResult:
    """The conversation with an answer that was thrown away, and another that was begun anew."""
    rollout = conversation(lost="Eleven!")
    rollout.messages = [{"role": "user", "content": "Summed up: two files."}]
    rollout.ask("user: How many? Summed up: two files.", "So, two.")
    return rollout.result()


class Page(HTMLParser):
    """A page's scripts by type, and its attributes that could load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[tuple[str | None, str]] = []
        self.links: list[tuple[str, str | None]] = []
        self._open = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [(name, value) for name, value in attrs if name in {"src", "href", "srcset", "data", "action"}]
        if self._open or tag == "script":
            self._open = True
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_data(self, data: str) -> None:
        if self._open:
            kind, before = self.scripts[-1]
            self.scripts[-1] = (kind, before + data)

    def handle_endtag(self, tag: str) -> None:
        self._open = False


def embedded(html: str) -> Any:
    """The data that the page's script reads."""
    page = Page(html)
    assert [kind for kind, _ in page.scripts] == ["application/json", None], "one script of data, one that shows it"
    return json.loads(page.scripts[0][1])


def plain(shown: View) -> Any:
    """The view as JSON holds it."""
    return json.loads(json.dumps(shown))


def byte_fallback() -> Any:
    """SentencePiece's way: a space is part of the token before a word, and what has no token is bytes."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe.train_from_iterator(
        ["the cat and the dog"] * 9, trainers.BpeTrainer(show_progress=False, special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


class TestTokenTexts:
    """The exact text of each token."""

    @given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=60))
    @example(TOKENIZER.encode("naïve 東京 🙂\n<|im_end|>"))
    @example(TOKENIZER.encode("🙂")[:-1] * 40)  # bytes that never make a character
    @example(TOKENIZER.encode("東\ufffd京"))
    def test_joined_they_are_the_text(self, ids: list[int]) -> None:
        texts = token_texts(Vocabulary(TOKENIZER), ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == text_of(ids)

    @given(st.text(st.characters(codec="utf-8")))
    def test_a_token_of_whole_characters_reads_as_it_decodes(self, text: str) -> None:
        ids = TOKENIZER.encode(text)
        for token, shown in zip(ids, token_texts(Vocabulary(TOKENIZER), ids), strict=True):
            assert shown == text_of([token]) or "\ufffd" in text_of([token])

    def test_a_character_of_several_tokens_stands_in_the_first(self) -> None:
        ids = TOKENIZER.encode("🙂!")
        assert token_texts(Vocabulary(TOKENIZER), ids) == ["🙂", *[""] * (len(ids) - 2), "!"]

    def test_tokens_of_sentencepiece(self) -> None:
        tokenizer = byte_fallback()
        ids = tokenizer.encode("the cat 🙂 and")
        assert text_of(ids, tokenizer) == "the cat 🙂 and"
        assert token_texts(Vocabulary(tokenizer), ids) == [" the", " cat", " ", "🙂", "", "", "", " and"]

    @given(st.binary(max_size=20))
    @example("naïve 東京 🙂".encode())
    @example(b"a\xf0\x9f\xf0\x9fb\xe6A")
    def test_bytes_read_as_python_reads_them(self, text: bytes) -> None:
        vocabulary = {byte: bytes([byte]) for byte in range(256)}
        assert "".join(token_texts(vocabulary, text)) == text.decode(errors="replace")


class TestSequences:
    def test_are_the_records_token_by_token(self) -> None:
        result = branched()
        for shown, sequence in zip(view(result, TOKENIZER)["sequences"], result.sequences, strict=False):
            assert shown["tokens"] == sequence.tokens
            assert [1.0 if value is None else value for value in shown["logprobs"]] == sequence.logprobs
            trained = [value is not None for value in shown["logprobs"]]
            assert trained == [mask != -100 for mask in sequence.masked_tokens]
            assert "".join(shown["texts"] or ()) == sequence.full_text

    def test_runs_part_the_tokens_into_what_was_read_and_what_was_sampled(self) -> None:
        for shown in view(branched())["sequences"]:
            runs = shown["runs"]
            assert runs[0]["start"] == 0
            assert runs[-1]["end"] == len(shown["tokens"])
            assert all(before["end"] == after["start"] for before, after in pairwise(runs))
            assert [run["turn"] is not None for run in runs] == [False, True] * (len(runs) // 2)

    def test_discarded_attempts_stand_apart_with_nothing_else_unmasked(self) -> None:
        result = branched()
        *trained, discarded = view(result, TOKENIZER)["sequences"]
        assert [sequence["discarded"] for sequence in trained] == [False] * len(result.sequences)
        assert discarded["discarded"]
        assert discarded["notes"][-1] == "discarded: the harness asked again"
        texts = discarded["texts"] or []
        assert (
            "".join(t for t, value in zip(texts, discarded["logprobs"], strict=True) if value is not None) == "Eleven!"
        )
        *others, last = [run["label"] for run in discarded["runs"] if run["turn"]]
        assert last.endswith(" · discarded: the harness asked again")
        assert all(label.endswith(" · trained in another sequence") for label in others)

    def test_each_sampled_token_is_unmasked_once_over_all_of_them(self) -> None:
        result = branched()
        shown = sum(value is not None for sequence in view(result)["sequences"] for value in sequence["logprobs"])
        assert result.fidelity is not None
        assert shown == result.fidelity.tokens_sampled

    def test_a_branch_says_where_it_left(self) -> None:
        first, second, discarded = view(branched())["sequences"]
        assert first["notes"] == []
        shared = len(TOKENIZER.encode("user: How many"))
        assert second["notes"] == [f"leaves Sequence 1 after {shared} tokens"]
        assert discarded["notes"][0] == f"leaves Sequence 1 after {first['runs'][-1]['start']} tokens"

    def test_a_turn_is_tied_to_its_message(self) -> None:
        shown = view(branched())
        for sequence in shown["sequences"]:
            for run in sequence["runs"]:
                if run["message"] is not None:
                    assert shown["messages"][run["message"]]["turn"] == run["turn"]

    @pytest.mark.parametrize("family", FAMILIES, ids=str)
    async def test_a_record_holds_what_its_tokens_say(self, family: Family, tmp_path: Path) -> None:
        server = ScriptedServer(["Two 🙂 files."], tokenizer=family.tokenizer(), end_token=family.special[0])
        result = await AtroposAgent(server).run("How many are in 東京?")
        write_record(result, tmp_path / "rollout.jsonl")
        (shown,) = view(read_record(tmp_path / "rollout.jsonl"))["sequences"]
        assert "".join(shown["texts"] or ()) == result.sequences[0].full_text
        assert "Two 🙂 files." in result.sequences[0].full_text

    def test_refuses_another_models_tokenizer(self) -> None:
        ids = TOKENIZER.encode("two files")
        for text in ("ten files", "two files more", "two file"):
            foreign = AgentResult(True, sequences=[SequenceData(text, ids, [-100] * len(ids), [1.0] * len(ids))])
            with pytest.raises(NoTokenizerError, match="pass the model's own"):
                view(foreign, TOKENIZER)

    def test_without_its_vocabulary_a_turn_has_the_text_that_the_record_has(self) -> None:
        first = view(replace(branched(), vocabulary={}))["sequences"][0]
        assert first["texts"] is None
        assert [run["text"] for run in first["runs"] if run["turn"]][-1] == "Two."

    def test_a_sequence_that_came_from_no_ledger_has_runs_all_the_same(self) -> None:
        foreign = SequenceData("abcd", [1, 2, 3, 4], [-100, 2, 3, -100], [1.0, -0.5, -0.5, 1.0])
        (shown,) = view(AgentResult(True, sequences=[foreign]))["sequences"]
        assert [(run["start"], run["end"], run["turn"] is None) for run in shown["runs"]] == [
            (0, 1, True),
            (1, 3, False),
            (3, 4, True),
        ]


class TestConversation:
    def test_attempts_keep_their_parse_status(self) -> None:
        messages = view(conversation().result())["messages"]
        malformed, told, called, answered, _ = messages[1:]
        assert malformed["reasoning"] == "I look."
        assert [call["status"] for call in malformed["calls"]] == ["invalid_json"]
        assert malformed["calls"][0]["error"]
        assert (told["failed"], told["note"]) == (True, "answers an attempt: invalid_json")
        assert called["calls"] == [
            {"name": "look", "arguments": [("folder", "/srv"), ("depth", "2")], "status": "ok", "error": None}
        ]
        assert (answered["name"], answered["failed"]) == ("look", False)
        assert answered["note"] == "ok · exit code 0 · 0.25 s"

    def test_a_call_whose_arguments_are_no_object_is_shown_as_it_is(self) -> None:
        call = {"id": "c", "function": {"name": "look", "arguments": '["a"'}}
        shown = view(AgentResult(False, messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]))
        assert shown["messages"][0]["calls"][0]["arguments"] == [("", '["a"')]

    def test_a_rollout_without_tokens_says_so(self) -> None:
        shown = view(AgentResult(False, tracked=False, error="it broke"))
        assert shown["sequences"] == []
        assert ("tokens", "none: the server returns no token ids") in shown["facts"]
        assert shown["problems"] == ["error: it broke"]

    def test_what_was_left_out_is_named(self) -> None:
        assert any("the harness asked again" in problem for problem in view(branched())["problems"])


class TestPage:
    def test_holds_the_view(self) -> None:
        shown = view(branched(), TOKENIZER)
        assert embedded(to_html(shown)) == plain(shown)

    def test_holds_the_same_after_the_record_was_read_back(self, tmp_path: Path) -> None:
        write_record(branched(), tmp_path / "rollout.jsonl")
        read = view(read_record(tmp_path / "rollout.jsonl"), TOKENIZER)
        for key in ("messages", "sequences", "problems"):
            assert read[key] == view(branched(), TOKENIZER)[key]

    @given(st.text() | st.text("</script!->{}& \u2028\u2029\ud800\udc00'\"\\\n", max_size=40))
    @example("</script><script>alert(1)</script>")
    @example("<!--<script>")
    @example("{{data}}")
    @example("\u2028\u2029\ud800")
    def test_no_text_gets_out_of_its_place(self, hostile: str) -> None:
        call = {"id": hostile, "function": {"name": hostile, "arguments": json.dumps({hostile: hostile})}}
        message = {"role": hostile, "content": hostile, "reasoning": hostile, "tool_calls": [call]}
        sequence = SequenceData(hostile, [1], [1], [-0.5])
        result = AgentResult(
            False, error=hostile, messages=[message], sequences=[sequence], metadata={hostile: hostile}
        )
        shown = view(result, title=hostile)
        html = to_html(shown)
        assert embedded(html) == plain(shown)
        html.encode("utf-8")

    def test_needs_nothing_but_itself(self) -> None:
        html = to_html(view(branched(), TOKENIZER))
        assert Page(html).links == []
        assert "default-src 'none'" in html
