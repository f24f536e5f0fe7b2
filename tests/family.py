"""What a model family is in the tests, and tokenizers made in memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hermes_atropos.testing.tokenizer import CORPUS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

THINK = ("<think>", "</think>")
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

# The ways in which a conversation goes on; ``Family.breaks`` names those in which a template changes what came before,
# or which it refuses, so that no bridge may be had.
USER = "a user after an answer"
RESULT = "a result after a call"
RESULTS = "results after calls"
LATER_RESULT = "a result after a call after a result"
LATER_USER = "a user after an answer after a result"
THOUGHT_USER = "a user after a thoughtful answer"
THOUGHT_RESULT = "a result after a thoughtful call"
RESULT_USER = "a result and a user after a call"
WAYS = (USER, RESULT, RESULTS, LATER_RESULT, LATER_USER, THOUGHT_USER, THOUGHT_RESULT, RESULT_USER)


@dataclass(frozen=True, repr=False)
class Family:
    """A model family.

    Attributes:
        template: as in ``tokenizer.chat_template``.
        special: special tokens; the first ends an answer, and is the tokenizer's end token unless ``eos`` says else.
        markup: added tokens that are not special.
        call_end: what ends an answer with calls, where that differs.
        format: in which the model writes calls.
        breaks: ways to go on for which no bridge may be had.
        whitespace: the template writes white space differently around messages that are not the last.
        system, tools, tool_role: whether the template knows system prompts, tools, and the role ``tool``.
        thinks: every answer has reasoning, because the prompt opens it.
        calls: whether the template writes calls; else they are text.
        example: a call as the system prompt shows it, where the template writes calls but does not describe the tools.
        tags: what the model writes around reasoning.
    """

    name: str
    template: Any
    special: tuple[str, ...]
    markup: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    call_end: str | None = None
    format: str = "hermes"
    breaks: frozenset[str] = field(default_factory=frozenset)
    whitespace: bool = False
    system: bool = True
    tools: bool = True
    tool_role: bool = True
    thinks: bool = False
    calls: bool = True
    example: str | None = None
    tags: tuple[str, str] = THINK

    def __repr__(self) -> str:
        return self.name

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer; a new one each time, so that a test may change it."""
        return make_tokenizer(self.template, self.special, self.markup, self.bos, self.eos or self.special[0])


@functools.cache
def _trained(special: tuple[str, ...], markup: tuple[str, ...]) -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in markup])
    return bpe.to_str()


def make_tokenizer(
    template: Any,
    special: tuple[str, ...],
    markup: tuple[str, ...] = (),
    bos: str | None = None,
    eos: str | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer of about 600 tokens with these special tokens, these others that stay whole, and this template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    named = {"eos_token": eos} if bos is None else {"eos_token": eos, "bos_token": bos}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(special, markup)),
        additional_special_tokens=[token for token in special if token not in named.values()],
        clean_up_tokenization_spaces=False,
        **named,
    )
    tokenizer.chat_template = template
    return tokenizer
