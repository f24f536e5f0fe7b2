"""A small byte-level BPE tokenizer with a ChatML template: real tokenisation without a download."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["CHATML_TEMPLATE", "chatml_tokenizer"]

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

# Enough English, shell, Python and JSON for merges that cross what a harness rewrites (spaces, quotes, braces).
CORPUS = [
    "You are a helpful assistant. You have access to the following tools. Use the terminal to run a command.",
    '{"name": "terminal", "arguments": {"command": "ls -la && cat file.txt", "timeout": 10}}',
    '{"type": "function", "function": {"name": "write_file", "description": "Write a file", "parameters": {}}}',
    "for line in open('data.txt'):\n    print(line.strip())\n\ndef main() -> None:\n    return None\n",
    "The command finished with exit code 0. The output is shown below.\n\nDone. There are 3 files in this folder.",
    "system user assistant tool function name arguments properties required string integer description",
    "I will look at the files first, then count the lines of Python, and then answer the question.",
] * 8

# The embedded model's: the layout of Qwen 2.5 and Hermes 3 (their tokenizer_config.json on the Hugging Face hub):
# <|im_start|>role\n…<|im_end|>\n, the tools in the system turn, consecutive tool results in one user turn.
CHATML_TEMPLATE = files("hermes_atropos.embedded").joinpath("model/chat_template.jinja").read_text(encoding="utf-8")


@functools.cache
def chatml_tokenizer() -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer of about 800 tokens, trained in memory on first use, the same in every process.

    ``<|im_start|>``, ``<|im_end|>`` and ``<|endoftext|>`` are special tokens; ``<tool_call>``, ``<tool_response>`` and
    ``<think>``, with their closing forms, are single tokens that decoding keeps. ``<|im_end|>`` ends a turn.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=131072,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer
