"""A drop-in for atroposlib's managed server, over an exact ledger."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage, ChatCompletionMessageFunctionToolCall
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_message_function_tool_call import Function
from pydantic import BaseModel

from hermes_atropos.backends import servers_of
from hermes_atropos.backends.tracked import INLINE_CHARS, TrackedBackend, off_loop
from hermes_atropos.exports import atropos
from hermes_atropos.messages import TURN_KEY, Message, Tool
from hermes_atropos.rendering.renderer import PlainRenderer
from hermes_atropos.rendering.tokenizers import decode, own_tokenizer, template_text
from hermes_atropos.tokens import BreakCause, Ledger, Match, Prompt, Turn
from hermes_atropos.tokens import Sequence as TokenSequence
from hermes_atropos.toolcalls import ToolCall
from hermes_atropos.trajectory import SequenceData

if TYPE_CHECKING:
    from atroposlib.envs.server_handling.managed_server import SequenceNode

__all__ = ["ExactManagedServer"]


class ExactManagedServer:
    """A drop-in for atroposlib's ``ManagedServer`` whose nodes hold exactly what was sent and sampled.

    Answers that come back in ``messages`` are recognised by what they say or, where the answer's own message (or its
    ``model_dump()``) comes back, by the ``TURN_KEY`` that it carries. The turn that they stand for goes into the next
    prompt as it was sampled, and is never rendered again. The same key finds an answer's node: it is the last ``ref``
    of ``node.metadata["turns"]``.

    Args:
        server: what ``TrackedBackend`` takes.
        tokenizer: the served model's; by default the server's, else the one that its configuration names. One that has
            no chat template but ``encode`` and ``decode`` will do for ``completion``.
        track_tree: give ``get_state`` one node a turn, trained on that turn alone, instead of one a sequence.
        tool_parser: how the model writes tool calls, by the name of vLLM's parser or one of ``toolcalls.FORMATS``; by
            default it is found out. Tools are rendered and calls are parsed with and without it.
        preserve_think_blocks: accepted, as atroposlib's has it; thinking that was sampled stays in the tokens anyway.
        chat_template_kwargs, vocab_size, context_length, patience_s: as in ``TrackedBackend``.

    Raises:
        NoTokenizerError: no tokenizer given, known or loadable.
        NoServerError, UnsupportedServerError: as ``TrackedBackend`` does.
    """

    def __init__(
        self,
        server: Any,
        tokenizer: Any = None,
        track_tree: bool = False,
        tool_parser: str | None = None,
        preserve_think_blocks: bool = False,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        context_length: int | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self.server = server
        self.tokenizer = tokenizer or own_tokenizer(servers_of(server)[0])
        self.track_tree = track_tree
        tool_format = tool_parser or "auto"
        plain = not getattr(self.tokenizer, "chat_template", None)
        self.backend = TrackedBackend(
            server,
            self.tokenizer,
            renderer=PlainRenderer(self.tokenizer, tool_format) if plain else None,
            tool_format=tool_format,
            chat_template_kwargs=chat_template_kwargs,
            vocab_size=vocab_size,
            context_length=context_length,
            patience_s=patience_s,
        )
        self.reset()

    @property
    def ledger(self) -> Ledger:
        """Every turn so far; ``report()`` says what became of the tokens."""
        return self.backend.ledger

    async def chat_completion(self, **kwargs: Any) -> ChatCompletion:
        """Ask for ``n`` answers to ``messages``, with ``tools`` and any sampling parameters.

        Returns:
            A completion whose content is what was sampled without special tokens, up to the first well-formed tool
            call. ``finish_reason`` is ``tool_calls`` if there are such calls, unless the answer was cut off.

        Raises:
            As ``TrackedBackend.sample_group``.
        """
        messages = [as_mapping(message) for message in kwargs.pop("messages", [])]
        tools = kwargs.pop("tools", None)
        choice = kwargs.pop("tool_choice", None)
        answers = await self.backend.answers(messages, tools, kwargs.pop("n", None) or 1, kwargs)
        turns = [turn for turn, _ in answers]
        callable_tools = bool(tools) and choice != "none"
        return ChatCompletion(
            id=f"chatcmpl-{turns[0].ref}",
            created=int(time.time()),
            model=self._model,
            object="chat.completion",
            choices=[
                self._choice(index, turn, parsed.calls if callable_tools else [])
                for index, (turn, parsed) in enumerate(answers)
            ],
            usage=usage(turns),
        )

    async def completion(self, **kwargs: Any) -> Completion:
        """Ask for ``n`` continuations of the text ``prompt``, with any sampling parameters.

        A prompt that begins with a former prompt and what followed it, special tokens included, continues those very
        tokens; only what is new is encoded. Any other prompt is encoded as a whole.

        Raises:
            As ``TrackedBackend.sample_group``.
        """
        text = kwargs.pop("prompt", "")
        prompt = await self._text_prompt(text)
        turns = await self.backend.ask(prompt, kwargs.pop("n", None) or 1, kwargs, lambda: text)
        choices = [
            CompletionChoice(index=index, text=self._text(turn), finish_reason=self.backend.finish_reason(turn))
            for index, turn in enumerate(turns)
        ]
        return Completion(
            id=f"cmpl-{turns[0].ref}",
            created=int(time.time()),
            model=self._model,
            object="text_completion",
            choices=choices,
            usage=usage(turns),
        )

    def get_state(self) -> dict[str, Any]:
        """What was sent and sampled, as atroposlib ``SequenceNode``s.

        Returns:
            ``{"nodes": [node]}``, one a sequence; with ``track_tree`` one a turn, by its full text, under both
            ``"sequences"`` and ``"tree"``. A node's ``tokens``, ``masked_tokens`` (-100 where not trained) and
            ``logprobs`` (1.0 there) are [seq_len]; each sampled token is trained in one node. ``metadata`` has the
            last turn's ``finish_reason``, and ``turns``: the ``ref``, ``start`` and ``end`` of each turn's tokens.
        """
        if not self.track_tree:
            return {"nodes": self.current_nodes}
        sequences = self.sequences
        return {"sequences": sequences, "tree": dict(sequences)}

    @property
    def current_nodes(self) -> list[SequenceNode]:
        """The nodes of ``get_state`` without ``track_tree``."""
        return [self._node(sequence) for sequence in self.ledger.sequences()]

    @property
    def sequences(self) -> dict[str, SequenceNode]:
        """The nodes of ``get_state`` with ``track_tree``. Of turns with the same text, the later have their ``ref`` in
        the key as well."""
        nodes: dict[str, SequenceNode] = {}
        for sequence in self.ledger.turn_sequences():
            node = self._node(sequence)
            nodes[node.full_text if node.full_text not in nodes else f"{node.full_text}#{sequence.turns[-1]}"] = node
        return nodes

    def reset(self) -> None:
        """Forget every turn."""
        self.backend = self.backend.fresh()
        self._appended: dict[Prompt, str] = {}
        self._said: dict[Turn, str] = {}

    async def get_logprobs(self, **kwargs: Any) -> dict[str, Any]:
        """Logprobs of a prompt, from the server: of ``messages``, a text ``prompt`` or ``input_ids``.

        Returns:
            ``prompt_tokens`` [prompt_len], ``prompt_topk_token_ids`` and ``prompt_topk_logprobs`` [prompt_len][k].

        Raises:
            NotImplementedError: the server has no such call.
        """
        if not hasattr(self.server, "get_logprobs"):
            raise NotImplementedError(f"{type(self.server).__name__} does not implement get_logprobs")
        if (messages := kwargs.pop("messages", None)) is not None:
            kwargs["prompt"] = self._convert_messages_to_prompt(messages)
        return await self.server.get_logprobs(**kwargs)

    def _convert_messages_to_prompt(self, messages: Sequence[Any], tools: Sequence[Tool] | None = None) -> str:
        """The messages as text; atroposlib's name for it, which its users call."""
        plain = [as_mapping(message) for message in messages]
        open_turn = not plain or plain[-1].get("role") != "assistant"
        return template_text(self.tokenizer, plain, tools, open_turn)

    @property
    def _model(self) -> str:
        return str(getattr(getattr(self.backend.servers[0], "config", None), "model_name", "unknown"))

    def _text(self, turn: Turn) -> str:
        return decode(self.tokenizer, turn.output_ids, skip_special_tokens=True)

    def _choice(self, index: int, turn: Turn, attempts: Sequence[ToolCall]) -> Choice:
        text = self._text(turn)
        calls = [call for call in attempts if call.ok]
        message = ChatCompletionMessage(
            role="assistant",
            content=text.partition(calls[0].raw)[0].strip() or None if calls else text,
            tool_calls=[ReadableCall.model_validate(call.to_openai()) for call in calls] or None,
        )
        self.ledger.answered(turn, message.model_dump(exclude_none=True), {"role": "assistant", "content": text})
        setattr(message, TURN_KEY, turn.ref)
        reason = self.backend.finish_reason(turn)
        return Choice(
            index=index, message=message, finish_reason="tool_calls" if calls and reason == "stop" else reason
        )

    def _node(self, sequence: TokenSequence) -> SequenceNode:
        node = atropos.sequence_node(SequenceData.cut(sequence, self.backend.renderer.decode))
        last = self.ledger.turn(sequence.turns[-1])
        node.metadata["finish_reason"] = self.backend.finish_reason(last)
        return node

    async def _text_prompt(self, text: str) -> Prompt:
        """The recorded prompt of that very text, or a new one that continues the longest recorded stream it can."""
        best: Turn | None = None
        end = 0
        open_prompts = [(prompt, 0) for prompt in self._appended if prompt.parent is None]
        while open_prompts:
            prompt, start = open_prompts.pop()
            appended = self._appended[prompt]
            if not text.startswith(appended, start):
                continue
            stop = start + len(appended)
            if stop == len(text):
                return prompt
            for turn in self.ledger.answers(prompt):
                answer = self._said.setdefault(turn, self.backend.renderer.decode(turn.output_ids))
                if text.startswith(answer, stop):
                    if stop + len(answer) >= end:
                        best, end = turn, stop + len(answer)
                    open_prompts.extend((child, stop + len(answer)) for child in self.ledger.prompts(turn))
        new = text[end:]
        ids = await off_loop(
            len(new) > INLINE_CHARS, lambda: list(self.tokenizer.encode(new, add_special_tokens=best is None))
        )
        prompt = self.ledger.prompt(Match(best, [], [], None if best else BreakCause.FIRST, False, None, None), ids)
        self._appended[prompt] = new
        return prompt


class Readable(BaseModel):
    """An object of openai's that can also be read as the dict that atroposlib gives in its place."""

    def __getitem__(self, key: str) -> Any:
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def keys(self) -> Set[str]:
        return self.model_fields_set

    def get(self, key: str, default: Any = None) -> Any:
        return getattr(self, key) if key in self.keys() else default


class ReadableFunction(Function, Readable):
    """A called function: ``call["function"]["name"]`` as well as ``call.function.name``."""


class ReadableCall(ChatCompletionMessageFunctionToolCall, Readable):
    """A tool call: ``call["id"]`` as well as ``call.id``."""

    function: ReadableFunction


def as_mapping(message: Any) -> Message:
    """A message as it may be appended by a caller: a dict, or the object of a former answer."""
    return message if isinstance(message, Mapping) else message.model_dump(exclude_none=True)


def usage(turns: Sequence[Turn]) -> CompletionUsage:
    prompt_tokens, completion_tokens = turns[0].prompt.length, sum(len(turn.output_ids) for turn in turns)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
