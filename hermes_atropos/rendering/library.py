"""The ``renderers`` library, for the models that it knows and whose template is the one at hand."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from hermes_atropos.errors import ChatTemplateError
from hermes_atropos.messages import Message, Tool, call_function
from hermes_atropos.rendering.bridge import TemplateRenderer
from hermes_atropos.rendering.dialect import PROBE_TOOL, SYSTEM, USER, probe_call, probe_result
from hermes_atropos.rendering.renderer import Renderer
from hermes_atropos.tokens import BreakCause
from hermes_atropos.toolcalls import ParsedText, ParseStatus, ToolCall
from hermes_atropos.toolcalls.call import failed_call, named_call

__all__ = ["LibraryRenderer", "library_renderer"]

logger = logging.getLogger(__name__)

ANSWER: Message = {"role": "assistant", "content": "An answer."}
#: What the library must render as the template does, to be used in its place.
PROBES: list[list[Message]] = [
    [USER],
    [SYSTEM, USER],
    [SYSTEM, USER, ANSWER, USER],
    [USER, {**ANSWER, "reasoning_content": "A thought."}, {"role": "user", "content": " \n naïve 🙂\n\n"}],
    [USER, probe_call("a\n"), probe_result(" result \n")],
    [SYSTEM, USER, probe_call("b", content="Let me see."), probe_result("first"), ANSWER, USER],
    [USER, probe_call("c", reasoning_content="A thought."), probe_result(""), probe_call("d"), probe_result("e")],
]

FAULTS = {
    "invalid_json": (ParseStatus.INVALID_JSON, "The arguments are not valid JSON."),
    "unclosed_block": (ParseStatus.UNCLOSED_BLOCK, "The call was begun and not ended."),
    "missing_name": (ParseStatus.MISSING_NAME, "The call does not name a tool."),
    "malformed_structure": (ParseStatus.MALFORMED, "The call does not have the form that this model's calls have."),
    "unknown_tool": (ParseStatus.UNKNOWN_TOOL, "There is no tool of that name."),
}


class LibraryRenderer(Renderer):
    """Bridges and parses as the library does, which reads tool calls from token ids.

    Prompts come from the tokenizer's template, where it has one: the library was found to render the same, and the
    template's text is cheaper to encode again. Where the library can't bridge, the template may.

    Args:
        library: a ``renderers.Renderer``.
        name: the library's name for the model family.
        tokenizer: for ``decode``.
        template: the tokenizer's template; None for the few models that have none.
    """

    def __init__(self, library: Any, name: str, tokenizer: Any, template: TemplateRenderer | None) -> None:
        self._library = library
        self.tokenizer = tokenizer
        self._template = template
        self.tool_format = template.tool_format if template else "hermes"
        self._names_results = name == "gpt-oss"
        self.stop_token_ids = frozenset(library.get_stop_token_ids())

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        return self._template.render(messages, tools) if self._template else self.render_by_library(messages, tools)

    def render_by_library(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """``render`` without the template.

        Raises:
            ChatTemplateError: the library refuses the conversation.
        """
        try:
            plain = self._plain(messages, tools, after=messages)
            return list(self._library.render_ids(plain, tools=_plain_tools(tools), add_generation_prompt=True))
        except Exception as error:  # the library raises what its family's template would: ValueError, KeyError …
            raise ChatTemplateError(f"The renderers library refuses the conversation: {error}") from error

    def bridge(
        self,
        history: Sequence[Message],
        turn_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
    ) -> list[int] | BreakCause:
        if len(history) < 2 or not new_messages:
            return BreakCause.UNPROVABLE
        # The library looks at the end of the prompt alone, for what that opened: a short one with that end will do.
        context = [USER, probe_call(""), probe_result("")] if history[-2]["role"] == "tool" else [USER]
        try:
            prompt = self.render_by_library(context)
            before = [*prompt, *turn_ids]
            plain = self._plain(new_messages, tools, after=history[-1:])
            bridged = self._library.bridge_to_next_turn(prompt, list(turn_ids), plain, tools=_plain_tools(tools))
        except Exception:
            logger.debug("The renderers library could not bridge", exc_info=True)
            bridged = None
        if bridged is not None and list(bridged.token_ids[: len(before)]) == before:
            return list(bridged.token_ids[len(before) :])
        if self._template is None:
            return BreakCause.UNPROVABLE
        return self._template.bridge(history, turn_ids, new_messages, tools)

    def parse(self, output_ids: Sequence[int], tools: Sequence[Tool] | None, prompt_ids: Sequence[int]) -> ParsedText:
        parsed = self._library.parse_response(list(output_ids), tools=_plain_tools(tools), prompt_ids=list(prompt_ids))
        reasoning = (parsed.reasoning_content or "").strip() or None
        calls = [_call(call, self.tool_format) for call in parsed.tool_calls]
        return ParsedText((parsed.content or "").strip() or None, reasoning, calls)

    def _plain(self, messages: Sequence[Message], tools: Any, *, after: Sequence[Message]) -> list[dict[str, Any]]:
        if self._template:
            plain, _ = self._template.prepare(messages, tools)
        else:
            plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if self._names_results:
            calls = [call for message in after for call in message.get("tool_calls") or ()]
            names = {call.get("id"): call_function(call).get("name") for call in calls}
            for message, given in zip(plain, messages, strict=False):
                if given["role"] == "tool" and given.get("tool_call_id") in names:
                    message["name"] = names[given["tool_call_id"]]
        return plain


def library_renderer(
    tokenizer: Any, template: TemplateRenderer | None, options: Mapping[str, Any]
) -> LibraryRenderer | None:
    """The library's renderer of a tokenizer's model.

    None where the library does not know the model by ``name_or_path``, or where it does not render as the tokenizer's
    own template does, which may have been changed.
    """
    model = getattr(tokenizer, "name_or_path", "")
    if not model:
        return None
    from renderers import create_renderer
    from renderers.base import MODEL_RENDERER_MAP

    name = MODEL_RENDERER_MAP.get(model)
    # OpenAI's encoder downloads its vocabulary unless told where one is; a training run only calls its servers.
    if name is None or (name == "gpt-oss" and "TIKTOKEN_ENCODINGS_BASE" not in os.environ):
        return None
    try:
        library = create_renderer(tokenizer, chat_template_kwargs=dict(options) or None)
    except Exception as error:
        logger.info("The renderers library knows %s, but not with this tokenizer: %s", model, error)
        return None
    renderer = LibraryRenderer(library, name, tokenizer, template)
    probes = itertools.product(PROBES, (None, [PROBE_TOOL]))
    if template and not all(_same(renderer, template, *probe) for probe in probes):
        logger.info("The chat template of %s is not the one that the renderers library knows", model)
        return None
    return renderer


def _same(renderer: LibraryRenderer, template: TemplateRenderer, messages: list[Message], tools: Any) -> bool:
    try:
        expected = template.render(messages, tools)
    except ChatTemplateError:
        return True
    try:
        return renderer.render_by_library(messages, tools) == expected
    except ChatTemplateError:
        return False


def _plain_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    return [dict(tool) for tool in tools] if tools else None


def _call(call: Any, tool_format: str) -> ToolCall:
    fields = {"raw": call.raw or "", "format": tool_format, "sampled_id": call.id}
    if str(call.status) == "ok":
        return named_call(call.name, call.arguments, **fields)
    status, error = FAULTS.get(str(call.status), FAULTS["malformed_structure"])
    return failed_call(status, error, name=call.name or "", **fields)
