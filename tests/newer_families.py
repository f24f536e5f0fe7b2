# ruff: noqa: E501  (templates are written as they are)
"""Families whose calls stand between tags of their own; the templates are our own compact ones, as in ``families``."""

from __future__ import annotations

from family import (
    LATER_USER,
    RESULT_USER,
    RESULTS,
    THINK,
    THOUGHT_USER,
    TOOL_TAGS,
    USER,
    WAYS,
    Family,
)


def conversation(*, head: str, user: str, answer: str, result: str, opening: str) -> str:
    """A template that goes through the messages behind a ``head``, which has the system prompt and the tools."""
    return (
        "{%- set ns = namespace(last=-1) -%}"
        "{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
        "{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}"
        + head
        + "{%- for message in messages -%}{%- set content = message.content or '' -%}{%- set thought = message.reasoning_content or '' -%}"
        + "{%- if message.role == 'user' -%}"
        + user
        + "{%- elif message.role == 'assistant' -%}"
        + answer
        + "{%- elif message.role == 'tool' -%}"
        + result
        + "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}"
        + opening
        + "{%- endif -%}"
    )


def calls(call: str, first: str = "", last: str = "", between: str = "") -> str:
    """The calls of an answer: each as ``call`` writes it, ``first`` before them and ``last`` behind."""
    return (
        "{%- for made in message.tool_calls or [] -%}{%- set call = made.function -%}"
        + "{%- if loop.first -%}" + first + "{%- endif -%}"
        + call
        + "{%- if loop.last -%}" + last + "{%- else -%}" + between + "{%- endif -%}{%- endfor -%}"
    )  # fmt: skip


TOOLS = "{%- if tools -%}{{- '\\nTools:\\n' -}}{%- for tool in tools -%}{{- (tool.function | tojson) + '\\n' -}}{%- endfor -%}%s{%- endif -%}"
VALUE = "(value if value is string else value | tojson)"
JSON_CALL = "{{- '{\"name\": \"' + call.name + '\", \"arguments\": ' + (call.arguments | tojson) + '}' -}}"


def pairs(head: str, parameter: str, end: str) -> str:
    """A call whose arguments are tagged; ``%s`` is where a name stands."""
    name, key = head.replace("%s", "' + call.name + '"), parameter.replace("%s", "' + key + '")
    return (
        "{{- '" + name + "' -}}{%- for key, value in call.arguments | items -%}{{- '" + key + "' + " + VALUE + " + '</parameter>\\n' -}}"
        "{%- endfor -%}{{- '" + end + "' -}}"
    )  # fmt: skip


SINCE_USER = "{%- if thought and loop.index0 > ns.last -%}{{- '%s' + thought + '%s' -}}{%- endif -%}"

# The prompt opens the reasoning, which is dropped once a user speaks; a result needs a call before it.
MINIMAX = Family(
    "MiniMax-M2",
    conversation(
        head="{{- ']~!b[]~b]system\\n' + (system or 'You are helpful.') -}}"
        + TOOLS.replace(
            "%s", "{{- '<minimax:tool_call>\\n<invoke name=\"tool\">\\n</invoke>\\n</minimax:tool_call>' -}}"
        )
        + "{{- '[e~[\\n' -}}{%- set called = namespace(yes=false) -%}",
        user="{{- ']~b]user\\n' + content + '[e~[\\n' -}}",
        answer="{{- ']~b]ai\\n' -}}"
        + SINCE_USER.replace("'%s'", "'<think>\\n'", 1).replace("'%s'", "'\\n</think>\\n\\n'", 1)
        + "{{- content -}}{%- set called.yes = message.tool_calls | length > 0 if message.tool_calls else false -%}"
        + calls(
            pairs('<invoke name="%s">\\n', '<parameter name="%s">', "</invoke>\\n"),
            "{{- '\\n<minimax:tool_call>\\n' -}}",
            "{{- '</minimax:tool_call>' -}}",
        )
        + "{{- '[e~[\\n' -}}",
        result="{%- if not called.yes -%}{{- raise_exception('a result without a call') -}}{%- endif -%}"
        "{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- ']~b]tool' -}}{%- endif -%}"
        "{{- '\\n<response>' + content + '</response>' -}}"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '[e~[\\n' -}}{%- endif -%}",
        opening="{{- ']~b]ai\\n<think>\\n' -}}",
    ),
    ("[e~[", "]~!b[", "]~b]"),
    (*THINK, "<minimax:tool_call>", "</minimax:tool_call>"),
    format="minimax",
    breaks=frozenset({USER, LATER_USER, THOUGHT_USER, RESULT_USER}),
    thinks=True,
)

# A special token precedes each tag of a call; reasoning stays visible, and an answer without it closes it all the same.
MARK = "]<]minimax[>["
MINIMAX_M3 = Family(
    "MiniMax-M3",
    conversation(
        head="{{- ']~!b[]~b]developer\\n' + (system or 'You are helpful.') -}}"
        + TOOLS.replace("%s", f"{{{{- 'Wrap calls in {MARK}<tool_call>{MARK}</tool_call>.' -}}}}")
        + "{{- '[e~[\\n' -}}",
        user="{{- ']~b]user\\n' + content + '[e~[\\n' -}}",
        answer="{{- ']~b]ai\\n' + ('<mm:think>' + thought if thought else '') + '</mm:think>' + content -}}"
        + calls(
            f"{{{{- '{MARK}<invoke name=\"' + call.name + '\">' -}}}}{{%- for key, value in call.arguments | items -%}}"
            f"{{{{- '{MARK}<' + key + '>' + {VALUE} + '{MARK}</' + key + '>' -}}}}{{%- endfor -%}}{{{{- '{MARK}</invoke>\\n' -}}}}",
            f"{{{{- '{MARK}<tool_call>\\n' -}}}}",
            f"{{{{- '{MARK}</tool_call>' -}}}}",
        )
        + "{{- '[e~[\\n' -}}",
        result="{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- ']~b]tool' -}}{%- endif -%}"
        "{{- '\\n<response>' + content + '</response>' -}}"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '[e~[\\n' -}}{%- endif -%}",
        opening="{{- ']~b]ai\\n' -}}",
    ),
    ("[e~[", "]~!b[", "]~b]", MARK),
    ("<mm:think>", "</mm:think>"),
    format="minimax_m3",
    tags=("<mm:think>", "</mm:think>"),
)

DSML = "｜DSML｜"
DEEPSEEK_V4 = Family(
    "DeepSeek V4",
    conversation(
        head="{{- bos_token + system -}}" + TOOLS.replace("%s", f"{{{{- 'Call within <{DSML}tool_calls>.' -}}}}"),
        user="{{- '<｜User｜>' + content -}}",
        answer="{{- '<｜Assistant｜></think>' + content -}}"
        + calls(
            f"{{{{- '<{DSML}invoke name=\"' + call.name + '\">\\n' -}}}}{{%- for key, value in call.arguments | items -%}}"
            f"{{{{- '<{DSML}parameter name=\"' + key + '\" string=\"' + ('true' if value is string else 'false') + '\">' + {VALUE} + '</{DSML}parameter>\\n' -}}}}"
            f"{{%- endfor -%}}{{{{- '</{DSML}invoke>\\n' -}}}}",
            f"{{{{- '\\n\\n<{DSML}tool_calls>\\n' -}}}}",
            f"{{{{- '</{DSML}tool_calls>' -}}}}",
        )
        + "{{- eos_token -}}",
        result="{{- '<｜User｜><tool_result>' + content + '</tool_result>' -}}",
        opening="{{- '<｜Assistant｜></think>' -}}",
    ),
    ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    THINK,
    bos="<｜begin▁of▁sentence｜>",
    format="deepseek",
)

GRANITE_TOKENS = ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>")


def granite(role: str, text: str = "content") -> str:
    return f"{{{{- '<|start_of_role|>{role}<|end_of_role|>' + {text} + '<|end_of_text|>\\n' -}}}}"


# Its calls are text to the template, which says how they are written.
GRANITE_33 = Family(
    "Granite 3.3",
    conversation(
        head=granite("system", "(system or 'You are Granite.') + (' Call with <|tool_call|> and a JSON list.' if tools else '')")
        + "{%- if tools -%}" + granite("available_tools", "(tools | tojson(indent=4))") + "{%- endif -%}",
        user=granite("user"),
        answer=granite("assistant"),
        result=granite("tool_response"),
        opening="{{- '<|start_of_role|>assistant<|end_of_role|>' -}}",
    ),
    GRANITE_TOKENS,
    format="granite",
    calls=False,
)  # fmt: skip
GRANITE_4 = Family(
    "Granite 4",
    conversation(
        head="{{- '<|start_of_role|>system<|end_of_role|>' + system -}}"
        + TOOLS.replace("%s", "{{- 'Call within <tool_call></tool_call>.' -}}")
        + "{{- '<|end_of_text|>\\n' -}}",
        user=granite("user"),
        answer="{{- '<|start_of_role|>assistant<|end_of_role|>' + content -}}"
        + calls("{{- '\\n<tool_call>\\n' -}}" + JSON_CALL + "{{- '\\n</tool_call>' -}}")
        + "{{- '<|end_of_text|>\\n' -}}",
        result=granite("user", "'\\n<tool_response>\\n' + content + '\\n</tool_response>'"),
        opening="{{- '<|start_of_role|>assistant<|end_of_role|>' -}}",
    ),
    GRANITE_TOKENS,
    TOOL_TAGS,
)


def chatml(role: str, text: str = "content") -> str:
    return f"{{{{- '<|im_start|>{role}\\n' + {text} + '<|im_end|>\\n' -}}}}"


# It neither writes calls nor says how: the tags are among its tokens.
LFM2 = Family(
    "LFM2",
    conversation(
        head="{{- bos_token -}}{%- if system or tools -%}{{- '<|im_start|>system\\n' + system -}}"
        "{%- if tools -%}{{- '\\nList of tools: <|tool_list_start|>' + (tools | tojson) + '<|tool_list_end|>' -}}{%- endif -%}"
        "{{- '<|im_end|>\\n' -}}{%- endif -%}",
        user=chatml("user"),
        answer=chatml("assistant"),
        result=chatml("tool", "'<|tool_response_start|>' + content + '<|tool_response_end|>'"),
        opening="{{- '<|im_start|>assistant\\n' -}}",
    ),
    ("<|im_end|>", "<|im_start|>", "<|startoftext|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>",
     "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
    bos="<|startoftext|>",
    format="lfm2",
    calls=False,
)  # fmt: skip

MINICPM = Family(
    "MiniCPM 5",
    conversation(
        head="{{- '<|im_start|>system\\n' + system -}}"
        + TOOLS.replace("%s", '{{- \'Call with <function name="f"><param name="x">value</param></function>.\' -}}')
        + "{{- '<|im_end|>\\n' -}}",
        user=chatml("user"),
        answer="{{- '<|im_start|>assistant\\n' + content -}}"
        + calls(
            pairs('<function name="%s">', '<param name="%s">', "</function>").replace("</parameter>\\n", "</param>")
        )
        + "{{- '<|im_end|>\\n' -}}",
        result=chatml("user", "'<tool_response>\\n' + content + '\\n</tool_response>'"),
        opening="{{- '<|im_start|>assistant\\n' -}}",
    ),
    ("<|im_end|>", "<|im_start|>"),
    format="minicpm",
)


def seed(role: str, text: str = "content") -> str:
    return f"{{{{- '<seed:bos>{role}\\n' + {text} + '<seed:eos>' -}}}}"


SEED_OSS = Family(
    "Seed-OSS",
    conversation(
        head="{%- if system or tools -%}{{- '<seed:bos>system\\n' + system -}}"
        + TOOLS.replace("%s", "{{- 'Call within <seed:tool_call></seed:tool_call>.' -}}")
        + "{{- '<seed:eos>' -}}{%- endif -%}",
        user=seed("user"),
        answer="{{- '<seed:bos>assistant\\n' -}}{%- if thought -%}{{- '<seed:think>' + thought + '</seed:think>' -}}{%- endif -%}{{- content -}}"
        + calls(
            "{{- '\\n<seed:tool_call>\\n' -}}"
            + pairs("<function=%s>\\n", "<parameter=%s>", "</function>\\n</seed:tool_call>")
        )
        + "{{- '<seed:eos>' -}}",
        result=seed("tool"),
        opening="{{- '<seed:bos>assistant\\n' -}}",
    ),
    ("<seed:eos>", "<seed:bos>"),
    ("<seed:think>", "</seed:think>", "<seed:tool_call>", "</seed:tool_call>"),
    format="seed_oss",
    tags=("<seed:think>", "</seed:think>"),
)

# One call to an answer, which it ends.
GIGACHAT = Family(
    "GigaChat 3.1",
    conversation(
        head="{{- 'system<|role_sep|>\\n' + system -}}"
        + TOOLS.replace("%s", "{{- 'Call with <|function_call|>.' -}}")
        + "{{- '<|message_sep|>\\n\\n' -}}",
        user="{{- 'user<|role_sep|>\\n' + content + '<|message_sep|>\\n\\n' -}}",
        answer="{%- if message.tool_calls and message.tool_calls | length > 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}"
        "{{- 'assistant<|role_sep|>\\n' + content -}}"
        + calls("{{- '<|function_call|>' -}}" + JSON_CALL)
        + "{{- '<|message_sep|>\\n\\n' -}}",
        result="{{- 'function result<|role_sep|>\\n' + content + '<|message_sep|>\\n\\n' -}}",
        opening="{{- 'assistant<|role_sep|>\\n' -}}",
    ),
    ("<|message_sep|>", "<|role_sep|>", "<|function_call|>"),
    format="gigachat",
    breaks=frozenset({RESULTS}),
)

APRIEL = Family(
    "Apriel 1.5",
    conversation(
        head="{{- '<|system|>\\n' + system -}}"
        + TOOLS.replace("%s", "{{- 'Call with <tool_calls>[]</tool_calls>.' -}}")
        + "{{- '\\n<|end|>\\n' -}}",
        user="{{- '<|user|>\\n' + content + '\\n<|end|>\\n' -}}",
        answer="{{- '<|assistant|>\\n' + content -}}"
        + calls(JSON_CALL, "{{- '\\n<tool_calls>[' -}}", "{{- ']</tool_calls>' -}}", "{{- ', ' -}}")
        + "{{- '\\n<|end|>\\n' -}}",
        result="{{- '<|tool_result|>\\n' + content + '\\n<|end|>\\n' -}}",
        opening="{{- '<|assistant|>\\n' -}}",
    ),
    ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool_result|>"),
    format="apriel",
)

# Calls are numbered through the conversation, results go by these numbers; answers and calls end otherwise.
COMMAND_R7B = Family(
    "Command R7B",
    conversation(
        head="{{- bos_token + '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system -}}"
        + TOOLS.replace("%s", "{{- 'Call with <|START_ACTION|>.' -}}")
        + "{{- '<|END_OF_TURN_TOKEN|>' -}}{%- set count = namespace(calls=0, results=0) -%}",
        user="{{- '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content + '<|END_OF_TURN_TOKEN|>' -}}",
        answer="{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- if message.tool_calls -%}"
        "{{- '<|START_THINKING|>' + (thought or content) + '<|END_THINKING|><|START_ACTION|>[' -}}"
        + calls(
            "{{- '{\"tool_call_id\": \"' + count.calls | string + '\", \"tool_name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}' -}}{%- set count.calls = count.calls + 1 -%}",
            between="{{- ', ' -}}",
        )
        + "{{- ']<|END_ACTION|>' -}}{%- else -%}{{- '<|START_RESPONSE|>' + content + '<|END_RESPONSE|>' -}}{%- endif -%}"
        "{{- '<|END_OF_TURN_TOKEN|>' -}}",
        result="{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>{\"' + count.results | string + '\": ' + (content | tojson) + '}<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>' -}}"
        "{%- set count.results = count.results + 1 -%}",
        opening="{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}",
    ),
    ("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
     "<|CHATBOT_TOKEN|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>",
     "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>"),
    bos="<BOS_TOKEN>",
    format="command_r",
    breaks=frozenset({*WAYS} - {USER, LATER_USER}),
    tags=("<|START_THINKING|>", "<|END_THINKING|>"),
)  # fmt: skip

# A result stands within the model's turn, which just goes on.
APERTUS = Family(
    "Apertus",
    conversation(
        head="{{- bos_token + '<|system_start|>' + system + '<|system_end|><|developer_start|>' -}}"
        + TOOLS.replace("%s", "{{- 'Call with <|tools_prefix|>[]<|tools_suffix|>.' -}}")
        + "{{- '<|developer_end|>' -}}{%- set within = namespace(turn=false) -%}",
        user="{%- if within.turn -%}{{- '<|assistant_end|>' -}}{%- set within.turn = false -%}{%- endif -%}{{- '<|user_start|>' + content + '<|user_end|>' -}}",
        answer="{%- if not within.turn -%}{{- '<|assistant_start|>' -}}{%- endif -%}{{- content -}}"
        + calls(
            "{{- '{\"' + call.name + '\": ' + (call.arguments | tojson) + '}' -}}",
            "{{- '<|tools_prefix|>[' -}}",
            "{{- ']<|tools_suffix|>' -}}",
            "{{- ', ' -}}",
        )
        + "{%- set within.turn = message.tool_calls is defined -%}{%- if not within.turn -%}{{- '<|assistant_end|>' -}}{%- endif -%}",
        result="{{- ('[' if messages[loop.index0 - 1].role != 'tool' else ', ') + content -}}"
        "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- ']' -}}{%- endif -%}",
        opening="{%- if not within.turn -%}{{- '<|assistant_start|>' -}}{%- endif -%}",
    ),
    ("<|assistant_end|>", "<s>", "<|system_start|>", "<|system_end|>", "<|developer_start|>", "<|developer_end|>",
     "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|tools_prefix|>", "<|tools_suffix|>"),
    bos="<s>",
    call_end="<|tools_suffix|>",
    format="apertus",
)  # fmt: skip

# Values stand in quotes that are tokens; a result goes into the model's turn; reasoning is shown beside calls alone.
GEMMA4 = Family(
    "Gemma 4",
    "{%- macro shown(value) -%}{%- if value is string -%}{{- '<|\"|>' + value + '<|\"|>' -}}{%- else -%}{{- value | tojson -}}{%- endif -%}{%- endmacro -%}"
    + conversation(
        head="{{- bos_token -}}{%- if system or tools -%}{{- '<|turn>system\\n' + system -}}"
        "{%- for tool in tools or [] -%}{{- '<|tool>' + (tool.function | tojson) + '<tool|>' -}}{%- endfor -%}{{- '<turn|>\\n' -}}{%- endif -%}",
        user="{{- '<|turn>user\\n' + content | trim + '<turn|>\\n' -}}",
        answer="{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|turn>model\\n' -}}{%- endif -%}"
        "{%- if thought and message.tool_calls -%}{{- '<|channel>thought\\n' + thought + '\\n<channel|>' -}}{%- endif -%}"
        + calls(
            "{{- '<|tool_call>call:' + call.name + '{' -}}{%- for key, value in call.arguments | dictsort -%}{{- key + ':' + shown(value) -}}{%- if not loop.last -%}{{- ',' -}}{%- endif -%}{%- endfor -%}{{- '}<tool_call|>' -}}"
        )
        + "{{- content | trim -}}{%- if message.tool_calls -%}{%- if loop.last -%}{{- '<|tool_response>' -}}{%- endif -%}{%- else -%}{{- '<turn|>\\n' -}}{%- endif -%}",
        result="{{- '<|tool_response>response:' + (message.name or 'tool') + '{value:' + shown(content) + '}<tool_response|>' -}}",
        opening="{%- if messages[-1].role != 'tool' -%}{{- '<|turn>model\\n' -}}{%- endif -%}",
    ),
    ("<turn|>", "<|turn>", "<bos>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
     "<|channel>", "<channel|>", '<|"|>'),
    bos="<bos>",
    call_end="<|tool_response>",
    format="gemma",
    breaks=frozenset({*WAYS} - {USER, LATER_USER}),
    tags=("<|channel>thought\n", "<channel|>"),
)  # fmt: skip

FAMILIES = [
    MINIMAX,
    MINIMAX_M3,
    DEEPSEEK_V4,
    GRANITE_33,
    GRANITE_4,
    LFM2,
    MINICPM,
    SEED_OSS,
    GIGACHAT,
    APRIEL,
    COMMAND_R7B,
    APERTUS,
    GEMMA4,
]
