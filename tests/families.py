# ruff: noqa: E501  (templates are written as they are)
"""Small tokenizers with the chat templates of the model families, for tests of whatever renders.

The templates are our own compact versions of those on the Hugging Face hub, from what is known of them: seldom their
words, but their quirks, such as trimming, dropping old reasoning, demanding alternation, re-serialising arguments,
closing a turn only when the next one opens. The tokenizers are byte-level BPE, trained in memory, with each family's
own tokens.
"""

from __future__ import annotations

import newer_families
from family import (
    LATER_RESULT,
    LATER_USER,
    RESULT,
    RESULT_USER,
    RESULTS,
    THINK,
    THOUGHT_RESULT,
    THOUGHT_USER,
    TOOL_TAGS,
    USER,
    WAYS,
    Family,
    make_tokenizer,
)

from hermes_atropos.testing.tokenizer import CHATML_TEMPLATE

__all__ = ["FAMILIES", "LATER_RESULT", "RESULT", "Family", "make_tokenizer"]

# ── ChatML ───────────────────────────────────────────────────────────────────────────────────────────────────────────

CHATML_TOKENS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")

# The plain template knows any role and no tools; the other one has them, leaves out what is said beside a call, and ends
# the last tool result otherwise than those before it.
HERMES3_PLAIN = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
HERMES3_TOOLS = """\
{{- '<|im_start|>system\\nYou call functions. Their signatures, within <tools></tools>: <tools> ' -}}
{%- for tool in tools -%}
{{- '{"type": "function", "function": ' + (tool.function | tojson) + '}' -}}{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}
{%- endfor -%}
{{- ' </tools>For each call return a JSON object within <tool_call></tool_call>.<|im_end|>\\n' -}}
{%- for message in messages -%}
{%- if message.role in ('user', 'system') or (message.role == 'assistant' and message.tool_calls is not defined) -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant' -}}
{%- for call in message.tool_calls -%}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' -}}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.previtem and loop.previtem.role != 'tool' -%}{{- '<|im_start|>tool\\n' -}}{%- endif -%}
{{- '<tool_response>\\n' + message.content + ('\\n</tool_response>' if loop.last else '\\n</tool_response>\\n') -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# What ChatML's descendants have in common; they differ in how an answer is written.
QWEN_HEAD = """\
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
{{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function \
signatures within <tools></tools> XML tags:\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n\
</tool_call><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
"""
QWEN_TOOL = """\
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' -}}{{- message.content -}}{{- '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
"""
QWEN_CALLS = """\
{%- for call in message.tool_calls or [] -%}
{%- if content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{%- set call = call.function if call.function else call -%}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' -}}
{{- call.arguments if call.arguments is string else call.arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
"""
QWEN_USER = """\
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
"""

# A default system prompt, and arguments always written as JSON: given as text, they would be quoted once more.
QWEN25 = (
    QWEN_HEAD.replace(
        "{%- elif messages[0].role == 'system' -%}",
        "{%- elif messages[0].role != 'system' -%}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
        "{%- elif messages[0].role == 'system' -%}",
    )
    + "{%- for message in messages -%}"
    + QWEN_USER
    + "{%- elif message.role == 'assistant' -%}{%- set content = message.content -%}"
    + "{{- '<|im_start|>assistant\\n' + content -}}"
    + QWEN_CALLS.replace("call.arguments if call.arguments is string else ", "")
    + QWEN_TOOL
    + "{%- endif -%}{%- endfor -%}"
    + "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# Reasoning is kept since the last user's message, and dropped before it; the last answer always has a block for it.
QWEN3_ANSWER = """\
{%- elif message.role == 'assistant' -%}
{%- set content = message.content -%}{%- set thought = '' -%}
{%- if message.reasoning_content is string -%}{%- set thought = message.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
{%- else -%}{{- content -}}{%- endif -%}
"""
QWEN3_START = """\
{%- set ns = namespace(last=messages | length - 1, found=false) -%}
{%- for message in messages[::-1] -%}
{%- if not ns.found and message.role == 'user' and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) -%}
{%- set ns.found = true -%}{%- set ns.last = messages | length - 1 - loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
"""
QWEN3_END = """\
{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""
QWEN3 = QWEN_HEAD + QWEN3_START + QWEN_USER + QWEN3_ANSWER + QWEN_CALLS + QWEN_TOOL + QWEN3_END
# The variant that only thinks: the generation prompt opens the block.
QWEN3_THINKING = QWEN3.replace(
    "{{- '<|im_start|>assistant\\n' -}}\n{%- if enable_thinking",
    "{{- '<|im_start|>assistant\\n<think>\\n' -}}\n{%- if enable_thinking",
)

QWEN3_CODER = """\
{%- if tools -%}
{{- '<|im_start|>system\\n' + (messages[0].content if messages[0].role == 'system' else 'You are Qwen.') -}}
{{- '\\n\\n# Tools\\n\\n<tools>' -}}
{%- for tool in tools -%}
{{- '\\n<function>\\n<name>' + tool.function.name + '</name>\\n<parameters>' + (tool.function.parameters | tojson) + '</parameters>\\n</function>' -}}
{%- endfor -%}
{{- '\\n</tools>\\n\\nCall with <tool_call>\\n<function=name>\\n<parameter=key>\\nvalue\\n</parameter>\\n</function>\\n</tool_call><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant' -}}
{%- if message.content is string and message.content | trim | length > 0 -%}{{- '\\n' + (message.content | trim) -}}{%- endif -%}
{%- if not message.tool_calls and not message.content | trim -%}{{- '\\n' -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' -}}
{%- for key, value in call.function.arguments | items -%}
{{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' -}}
{%- endfor -%}
{{- '</function>\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.previtem and loop.previtem.role != 'tool' -%}{{- '<|im_start|>user\\n' -}}{%- endif -%}
{{- '<tool_response>\\n' + message.content + '\\n</tool_response>\\n' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# ── Llama ────────────────────────────────────────────────────────────────────────────────────────────────────────────

LLAMA_TOKENS = (
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|begin_of_text|>",
    "<|eom_id|>",
    "<|python_tag|>",
)

# Reasoning stands in the content, and is dropped from earlier answers unless ``keep_cots`` is set.
HERMES4 = """\
{%- set keep_cots = keep_cots is defined and keep_cots -%}
{{- bos_token -}}
{%- if tools or messages[0].role == 'system' -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content -}}{%- endif -%}
{%- if tools -%}
{{- '\\n\\nTools, within <tools></tools>:\\n<tools>\\n' -}}
{%- for tool in tools -%}{{- tool | tojson -}}{{- '\\n' -}}{%- endfor -%}
{{- '</tools>\\nCall one within <tool_call></tool_call>.' -}}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set content = message.content -%}
{%- if not keep_cots and '</think>' in content -%}{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' + content -}}
{%- for call in message.tool_calls or [] -%}
{{- '\\n<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|eot_id|>' -}}
{%- elif message.role == 'tool' -%}
{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|start_header_id|>tool<|end_header_id|>\\n\\n' -}}{%- endif -%}
{{- '<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|eot_id|>' -}}{%- else -%}{{- '\\n' -}}{%- endif -%}
{%- elif not loop.first or message.role != 'system' -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- if thinking is defined and thinking -%}{{- '<think>\\n' -}}{%- endif -%}
{%- endif -%}"""

# Contents are trimmed, tools stand in the first user message, results are quoted as JSON, calls come one at a time.
LLAMA31 = """\
{{- bos_token -}}
{%- set system = '' -%}
{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content | trim -%}{%- set messages = messages[1:] -%}{%- endif -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{%- if tools -%}{{- 'Environment: ipython\\n' -}}{%- endif -%}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + '<|eot_id|>' -}}
{%- for message in messages -%}
{%- if message.tool_calls is defined -%}
{%- if message.tool_calls | length != 1 -%}{{- raise_exception('This model only supports single tool-calls at once!') -}}{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' -}}
{{- call.arguments | tojson -}}{{- '}<|eot_id|>' -}}
{%- elif message.role == 'tool' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' -}}{{- message.content | tojson -}}{{- '<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
{%- if loop.first and tools -%}
{{- 'Respond in the format {"name": function name, "parameters": dictionary}.\\n\\n' -}}
{%- for tool in tools -%}{{- tool | tojson(indent=4) -}}{{- '\\n\\n' -}}{%- endfor -%}
{%- endif -%}
{{- (message.content | trim) + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

# ── Mistral, Gemma ───────────────────────────────────────────────────────────────────────────────────────────────────

MISTRAL_TOKENS = (
    "</s>", "<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
)  # fmt: skip

# Roles alternate, ids have nine characters, the tools stand before the last user message: a new one moves them.
MISTRAL = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' -}}{%- set messages = messages[1:] -%}
{%- endif -%}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- set ns = namespace(turn=0) -%}
{%- for message in messages -%}
{%- if message.role != 'tool' and message.tool_calls is not defined -%}
{%- if (message.role == 'user') != (ns.turn % 2 == 0) -%}{{- raise_exception('Conversation roles must alternate!') -}}{%- endif -%}
{%- set ns.turn = ns.turn + 1 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- if tools and message == users[-1] -%}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{{- '[INST]' + message.content + '[/INST]' -}}
{%- elif message.tool_calls is defined -%}
{{- '[TOOL_CALLS][' -}}
{%- for call in message.tool_calls -%}
{%- if call.id | length != 9 -%}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}{%- endif -%}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') -}}
{%- endfor -%}
{{- eos_token -}}
{%- elif message.role == 'assistant' -%}{{- message.content + eos_token -}}
{%- elif message.role == 'tool' -%}
{%- if message.tool_call_id | length != 9 -%}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}{%- endif -%}
{{- '[TOOL_RESULTS]{"content": ' + (message.content | tojson) + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' -}}
{%- else -%}{{- raise_exception('Only user, assistant and tool roles are supported!') -}}
{%- endif -%}
{%- endfor -%}"""

# Neither system prompts nor tools; roles alternate; contents are trimmed.
GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('System role not supported') -}}{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Conversation roles must alternate!') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + (message.content | trim) + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

# ── DeepSeek ─────────────────────────────────────────────────────────────────────────────────────────────────────────

DEEPSEEK_TOKENS = ("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
DEEPSEEK_MARKUP = (
    *THINK, "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
)  # fmt: skip

# Arguments are text; after results no assistant turn is opened, the model just goes on.
DEEPSEEK_V3 = """\
{%- set ns = namespace(results=false) -%}
{{- bos_token -}}
{%- for message in messages if message.role == 'system' -%}{{- message.content -}}{%- endfor -%}
{%- if tools -%}{{- '\\n\\n## Tools\\n' + (tools | tojson) -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role != 'tool' and ns.results -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
{%- if message.role == 'user' -%}{{- '<｜User｜>' + message.content -}}
{%- elif message.role == 'assistant' -%}
{%- if not ns.results -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
{{- message.content -}}
{%- for call in message.tool_calls or [] -%}
{%- if loop.first -%}{{- '<｜tool▁calls▁begin｜>' -}}{%- endif -%}
{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```<｜tool▁call▁end｜>' -}}
{%- if loop.last -%}{{- '<｜tool▁calls▁end｜>' -}}{%- endif -%}
{%- endfor -%}
{{- '<｜end▁of▁sentence｜>' -}}
{%- elif message.role == 'tool' -%}
{%- if not ns.results -%}{{- '<｜tool▁outputs▁begin｜>' -}}{%- endif -%}
{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' -}}
{%- endif -%}
{%- set ns.results = message.role == 'tool' -%}
{%- endfor -%}
{%- if ns.results -%}{{- '<｜tool▁outputs▁end｜>' -}}{%- endif -%}
{%- if add_generation_prompt and not ns.results -%}{{- '<｜Assistant｜>' -}}{%- endif -%}"""

# No place for tools; the generation prompt opens the reasoning, which is dropped from every answer that is read again.
DEEPSEEK_R1 = """\
{{- bos_token -}}
{%- for message in messages if message.role == 'system' -%}{{- message.content -}}{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- '<｜User｜>' + message.content -}}
{%- elif message.role == 'assistant' -%}
{%- set content = message.content -%}
{%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}"""

# Calls and results have a place, the tools have none; after results the model just goes on.
DEEPSEEK_V31 = """\
{{- bos_token -}}
{%- for message in messages if message.role == 'system' -%}{{- message.content -}}{%- endfor -%}
{%- set ns = namespace(within=false) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- '<｜User｜>' + message.content -}}{%- set ns.within = false -%}
{%- elif message.role == 'assistant' -%}
{%- if not ns.within -%}{{- '<｜Assistant｜></think>' -}}{%- endif -%}
{{- message.content.split('</think>')[-1] -}}
{%- for call in message.tool_calls or [] -%}
{%- if loop.first -%}{{- '<｜tool▁calls▁begin｜>' -}}{%- endif -%}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + (call.function.arguments | tojson) + '<｜tool▁call▁end｜>' -}}
{%- if loop.last -%}{{- '<｜tool▁calls▁end｜>' -}}{%- endif -%}
{%- endfor -%}
{{- '<｜end▁of▁sentence｜>' -}}{%- set ns.within = true -%}
{%- elif message.role == 'tool' -%}{{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.within -%}{{- '<｜Assistant｜></think>' -}}{%- endif -%}"""

# ── GLM, Kimi, gpt-oss ───────────────────────────────────────────────────────────────────────────────────────────────

GLM_TOKENS = ("<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "[gMASK]", "<sop>", "<|endoftext|>")
GLM_MARKUP = (*THINK, *TOOL_TAGS, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

# No turn has an end: the next role's token ends it, and is what the model samples. Every answer has a reasoning block,
# empty before the last user message; contents of answers are stripped.
GLM45 = """\
{{- '[gMASK]<sop>' -}}
{%- if tools -%}
{{- '<|system|>\\n# Tools\\n\\n<tools>\\n' -}}{%- for tool in tools -%}{{- tool | tojson -}}{{- '\\n' -}}{%- endfor -%}
{{- '</tools>\\n\\nCall with <tool_call>{name}\\n<arg_key>{key}</arg_key>\\n<arg_value>{value}</arg_value>\\n</tool_call>' -}}
{%- endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- '<|user|>\\n' + message.content -}}
{%- elif message.role == 'system' -%}{{- '<|system|>\\n' + message.content -}}
{%- elif message.role == 'assistant' -%}
{%- set content = message.content -%}{%- set thought = message.reasoning_content or '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
{{- '<|assistant|>\\n<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' -}}
{%- if content.strip() -%}{{- '\\n' + content.strip() -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{{- '\\n<tool_call>' + call.function.name + '\\n' -}}
{%- for key, value in call.function.arguments.items() -%}
{{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' + (value if value is string else value | tojson) + '</arg_value>\\n' -}}
{%- endfor -%}
{{- '</tool_call>' -}}
{%- endfor -%}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|observation|>' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""

KIMI_TOKENS = ("<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "[EOS]")
KIMI_MARKUP = (
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
)  # fmt: skip

KIMI_K2 = """\
{%- if tools -%}{{- '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson) + '<|im_end|>' -}}{%- endif -%}
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{- '<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>' -}}
{%- endif -%}
{%- if message.role == 'tool' -%}
{{- '<|im_system|>tool<|im_middle|>## Return of ' + message.tool_call_id + '\\n' + message.content -}}
{%- else -%}
{{- '<|im_' + message.role + '|>' + message.role + '<|im_middle|>' + message.content -}}
{%- for call in message.tool_calls or [] -%}
{%- if loop.first -%}{{- '<|tool_calls_section_begin|>' -}}{%- endif -%}
{{- '<|tool_call_begin|>' + call.id + '<|tool_call_argument_begin|>' -}}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson -}}
{{- '<|tool_call_end|>' -}}
{%- if loop.last -%}{{- '<|tool_calls_section_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}"""

HARMONY_TOKENS = ("<|return|>", "<|call|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>")

# <|return|> ends the last answer and <|end|> an earlier one, so no answer can be followed exactly; <|call|> ends a call.
# Reasoning is kept until there is an answer; a message has one call, and its result is named after it.
GPT_OSS = """\
{%- set ns = namespace(called=none) -%}
{{- '<|start|>system<|message|>You are ChatGPT.\\nCurrent date: ' + strftime_now('%Y-%m-%d') + '<|end|>' -}}
{%- if messages[0].role == 'system' or tools -%}
{{- '<|start|>developer<|message|>' -}}
{%- if messages[0].role == 'system' -%}{{- '# Instructions\\n\\n' + messages[0].content + '\\n\\n' -}}{%- endif -%}
{%- if tools -%}
{{- '# Tools\\n\\nnamespace functions {\\n' -}}
{%- for tool in tools -%}{{- 'type ' + tool.function.name + ' = (_: ' + (tool.function.parameters | tojson) + ') => any;\\n' -}}{%- endfor -%}
{{- '}' -}}
{%- endif -%}
{{- '<|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{- '<|start|>user<|message|>' + message.content + '<|end|>' -}}
{%- elif message.role == 'assistant' and 'tool_calls' in message -%}
{%- set later = namespace(answer=false) -%}
{%- for after in messages[loop.index:] -%}
{%- if after.role == 'assistant' and 'tool_calls' not in after -%}{%- set later.answer = true -%}{%- endif -%}
{%- endfor -%}
{%- if message.content and message.thinking -%}{{- raise_exception('Cannot pass both content and thinking with tool calls!') -}}{%- endif -%}
{%- set thought = message.content or message.thinking -%}
{%- if thought and not later.answer -%}{{- '<|start|>assistant<|channel|>analysis<|message|>' + thought + '<|end|>' -}}{%- endif -%}
{%- set ns.called = message.tool_calls[0].function.name -%}
{{- '<|start|>assistant to=functions.' + ns.called + '<|channel|>commentary json<|message|>' -}}
{{- message.tool_calls[0].function.arguments | tojson -}}{{- '<|call|>' -}}
{%- elif message.role == 'assistant' -%}
{%- if loop.last and not add_generation_prompt and message.thinking -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content -}}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
{%- elif message.role == 'tool' -%}
{%- if ns.called is none -%}{{- raise_exception('Message has tool role, but there was no previous tool call!') -}}{%- endif -%}
{{- '<|start|>functions.' + ns.called + ' to=assistant<|channel|>commentary<|message|>' + (message.content | tojson) + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"""

# ── A user's own ─────────────────────────────────────────────────────────────────────────────────────────────────────

# Plain words for roles, no tools, no tool role; only the end of an answer is a token.
OWN = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- message.content + '\\n\\n' -}}
{%- elif message.role == 'user' -%}{{- '### Instruction:\\n' + message.content + '\\n\\n' -}}
{%- elif message.role == 'assistant' -%}{{- '### Response:\\n' + message.content + eos_token + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}"""

CHATML = Family("ChatML", CHATML_TEMPLATE, CHATML_TOKENS, (*THINK, *TOOL_TAGS))
HERMES3_FAMILY = Family(
    "Hermes 3",
    {"default": HERMES3_PLAIN, "tool_use": HERMES3_TOOLS},
    CHATML_TOKENS,
    (*THINK, *TOOL_TAGS),
    whitespace=True,
)
HERMES4_FAMILY = Family(
    "Hermes 4",
    HERMES4,
    LLAMA_TOKENS,
    (*THINK, *TOOL_TAGS),
    bos="<|begin_of_text|>",
    breaks=frozenset({THOUGHT_USER, THOUGHT_RESULT}),
)
QWEN25_FAMILY = Family("Qwen 2.5", QWEN25, CHATML_TOKENS, TOOL_TAGS)
QWEN3_FAMILY = Family(
    "Qwen 3",
    QWEN3,
    CHATML_TOKENS,
    (*THINK, *TOOL_TAGS),
    breaks=frozenset({LATER_USER, THOUGHT_USER}),
)
QWEN3_THINKING_FAMILY = Family(
    "Qwen 3 Thinking",
    QWEN3_THINKING,
    CHATML_TOKENS,
    (*THINK, *TOOL_TAGS),
    breaks=frozenset({USER, LATER_USER, THOUGHT_USER, RESULT_USER}),
    thinks=True,
)
QWEN3_CODER_FAMILY = Family("Qwen 3 Coder", QWEN3_CODER, CHATML_TOKENS, (*THINK, *TOOL_TAGS), format="qwen3_coder")
LLAMA31_FAMILY = Family(
    "Llama 3.1",
    LLAMA31,
    LLAMA_TOKENS,
    bos="<|begin_of_text|>",
    format="llama3_json",
    breaks=frozenset({RESULTS}),
)
MISTRAL_FAMILY = Family("Mistral", MISTRAL, MISTRAL_TOKENS, bos="<s>", format="mistral")
GEMMA_FAMILY = Family(
    "Gemma 2",
    GEMMA,
    ("<end_of_turn>", "<start_of_turn>", "<bos>", "<eos>"),
    bos="<bos>",
    eos="<eos>",
    system=False,
    tools=False,
    tool_role=False,
)
DEEPSEEK_V3_FAMILY = Family(
    "DeepSeek V3", DEEPSEEK_V3, DEEPSEEK_TOKENS, DEEPSEEK_MARKUP, bos="<｜begin▁of▁sentence｜>", format="deepseek"
)
DEEPSEEK_R1_FAMILY = Family(
    "DeepSeek R1",
    DEEPSEEK_R1,
    DEEPSEEK_TOKENS,
    DEEPSEEK_MARKUP,
    bos="<｜begin▁of▁sentence｜>",
    tools=False,
    tool_role=False,
    breaks=frozenset(WAYS),
)
DEEPSEEK_V31_FAMILY = Family(
    "DeepSeek V3.1",
    DEEPSEEK_V31,
    DEEPSEEK_TOKENS,
    DEEPSEEK_MARKUP,
    bos="<｜begin▁of▁sentence｜>",
    format="deepseek",
    tools=False,
    example="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function_name<｜tool▁sep｜>"
    '{"parameter": "value"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    breaks=frozenset({THOUGHT_USER, THOUGHT_RESULT}),
)
GLM45_FAMILY = Family(
    "GLM 4.5",
    GLM45,
    GLM_TOKENS,
    GLM_MARKUP,
    eos="<|endoftext|>",
    call_end="<|observation|>",
    format="glm",
    breaks=frozenset({LATER_USER, THOUGHT_USER}),
)
KIMI_K2_FAMILY = Family("Kimi K2", KIMI_K2, KIMI_TOKENS, KIMI_MARKUP, eos="[EOS]", format="kimi")
GPT_OSS_FAMILY = Family(
    "gpt-oss",
    GPT_OSS,
    HARMONY_TOKENS,
    call_end="<|call|>",
    format="gpt_oss",
    tags=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    breaks=frozenset({USER, RESULTS, LATER_USER, THOUGHT_USER}),
)
OWN_FAMILY = Family("A user's own", OWN, ("</s>", "<s>"), bos="<s>", tools=False, tool_role=False)

FAMILIES = [
    CHATML,
    HERMES3_FAMILY,
    HERMES4_FAMILY,
    QWEN25_FAMILY,
    QWEN3_FAMILY,
    QWEN3_THINKING_FAMILY,
    QWEN3_CODER_FAMILY,
    LLAMA31_FAMILY,
    MISTRAL_FAMILY,
    GEMMA_FAMILY,
    DEEPSEEK_V3_FAMILY,
    DEEPSEEK_R1_FAMILY,
    DEEPSEEK_V31_FAMILY,
    GLM45_FAMILY,
    KIMI_K2_FAMILY,
    GPT_OSS_FAMILY,
    OWN_FAMILY,
    *newer_families.FAMILIES,
]
