"""A Llama in numpy: what it says of the next token, computed in float32, with keys and values kept from call to call.

The architecture is that of LLaMA (https://arxiv.org/abs/2302.13971) with grouped-query attention
(https://arxiv.org/abs/2305.13245), in the layout of Hugging Face's ``LlamaForCausalLM``: ``config.json`` and
``model.safetensors``.

Keys and values lie in blocks of ``BLOCK`` tokens. A block belongs to no one: sequences with a common prefix have the
same blocks, and one that goes on where another has already written begins a block of its own. So attention goes block
by block, for all sequences that have it at once, and the softmax is kept running from block to block
(https://arxiv.org/abs/1805.02867).

Queries, keys and their products are float64: a head that can't decide between two tokens makes much of the last bits of
their scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hermes_atropos.errors import CheckpointError

__all__ = ["BLOCK", "Block", "Llama", "LlamaConfig", "Sequence", "log_softmax"]

Array = NDArray[np.float32]

#: Tokens of a block.
BLOCK = 1024


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shape of a model; names as in ``config.json``."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    eos_token_ids: frozenset[int]

    @classmethod
    def read(cls, folder: Path) -> LlamaConfig:
        """What ``config.json`` in a checkpoint's folder says.

        Raises:
            CheckpointError: there is none, or it asks for what this model does not do.
        """
        path = folder / "config.json"
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read: give the folder of a Hugging Face checkpoint") from error
        # Before transformers 5 the rotary parameters stood beside the others.
        rope = told.get("rope_parameters") or {"rope_theta": told.get("rope_theta"), **(told.get("rope_scaling") or {})}
        asked = {**told, "rope_type": rope.get("rope_type") or rope.get("type")}
        for name, able in _ABLE.items():
            if asked.get(name, able[0]) not in able:
                raise CheckpointError(f"{path}: {name}={asked[name]!r} is not done here, only {able[0]!r}")
        eos = told.get("eos_token_id")
        try:
            derived = {
                "head_dim": told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"],
                "num_key_value_heads": told.get("num_key_value_heads") or told["num_attention_heads"],
                "rope_theta": float(rope.get("rope_theta") or 10000.0),
                "eos_token_ids": frozenset([] if eos is None else eos if isinstance(eos, list) else [eos]),
            }
            return cls(**{name: derived[name] if name in derived else told[name] for name in cls.__slots__})
        except KeyError as error:
            raise CheckpointError(f"{path} has no {error}: give the configuration of a LlamaForCausalLM") from error


# What a configuration may ask for; the first is what counts where it asks for nothing.
_ABLE: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (True,),
    "rope_type": ("default", None),
    "partial_rotary_factor": (1.0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
}


class Block:
    """Keys and values of up to ``BLOCK`` tokens: ``[layer, kv_head, token, head_dim] float32`` each.

    Attributes:
        start: the position of its first token.
        filled: how many tokens were written, by whomever.
    """

    __slots__ = ("filled", "keys", "start", "values")

    def __init__(self, config: LlamaConfig, start: int) -> None:
        shape = (config.num_hidden_layers, config.num_key_value_heads, BLOCK, config.head_dim)
        self.start = start
        self.filled = 0
        self.keys: NDArray[np.float64] = np.empty(shape)
        self.values: Array = np.empty(shape, np.float32)


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens whose keys and values are known.

    Attributes:
        tokens: [length] int.
        blocks: where their keys and values lie, in order, each with how many of its tokens are this sequence's.
    """

    tokens: list[int] = field(default_factory=list)
    blocks: list[tuple[Block, int]] = field(default_factory=list)

    def prefix(self, length: int) -> Sequence:
        """The first ``length`` tokens, in the same blocks."""
        blocks = [(block, min(used, length - block.start)) for block, used in self.blocks if block.start < length]
        return Sequence(self.tokens[:length], blocks)


@dataclass(slots=True)
class _Reading:
    """Which rows of a batch read a block: up to ``length`` tokens of it, each row as far as ``bias`` (0 or −∞) says."""

    block: Block
    rows: Any
    length: int
    bias: Array | None


class Llama:
    """A checkpoint that was read into memory.

    Args:
        folder: of ``config.json`` and ``model.safetensors``.

    Raises:
        CheckpointError: a file is missing, or the checkpoint is of another kind.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.config = config = LlamaConfig.read(folder)
        weights = _read_weights(folder / "model.safetensors")

        def take(name: str, *shape: int) -> Array:
            found = weights.pop(name, None)
            if found is None or found.shape != shape:
                raise CheckpointError(f"{folder}: {name} is {'missing' if found is None else found.shape}, not {shape}")
            return found

        hidden, inner = config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.embeddings = take("model.embed_tokens.weight", config.vocab_size, hidden)
        self.norm = take("model.norm.weight", hidden)
        self.layers = []
        for number in range(config.num_hidden_layers):
            at = f"model.layers.{number}."
            query = take(f"{at}self_attn.q_proj.weight", heads, hidden) / np.float64(config.head_dim) ** 0.5
            key, value = (take(f"{at}self_attn.{name}_proj.weight", kv_heads, hidden) for name in "kv")
            gate, up = (take(f"{at}mlp.{name}_proj.weight", inner, hidden) for name in ("gate", "up"))
            self.layers.append(
                _Layer(
                    attention_norm=take(f"{at}input_layernorm.weight", hidden),
                    query_key_value=np.ascontiguousarray(np.concatenate([query, key, value]).T),
                    output=_columns(take(f"{at}self_attn.o_proj.weight", hidden, heads)),
                    mlp_norm=take(f"{at}post_attention_layernorm.weight", hidden),
                    gate_up=_columns(gate, up),
                    down=_columns(take(f"{at}mlp.down_proj.weight", hidden, inner)),
                )
            )
        if strange := weights.keys() - {"lm_head.weight"}:
            raise CheckpointError(f"{folder} has weights that a Llama has no place for: {', '.join(sorted(strange))}")
        # Rounded to float32 once, as Hugging Face's: numpy's own float32 power differs in the last bit with the
        # processor's vector instructions, and 2,500 tokens on that is 4e-4 of a logprob.
        part = (np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)).astype(np.float64)
        frequencies = np.float32(1) / (config.rope_theta**part).astype(np.float32)
        angles = np.arange(config.max_position_embeddings, dtype=np.float32)[:, None] * frequencies
        self._cos, self._sin = (turn(angles.astype(np.float64)).astype(np.float32) for turn in (np.cos, np.sin))

    def forward(self, steps: Many[tuple[Sequence, Many[int]]]) -> Array:
        """Append tokens to sequences, and say what comes next.

        Args:
            steps: sequences, each with the tokens that are appended to it: many of a prompt, one of an answer. No
                sequence twice.

        Returns:
            The logits after each of the tokens: [sum of tokens, hidden_size], to be handed to ``logits``.
        """
        positions, readings, writings = self._plan(steps)
        config, count = self.config, len(positions)
        kv_heads, size = config.num_key_value_heads, config.head_dim
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        x = self.embeddings[np.concatenate([np.asarray(ids, np.int64) for _, ids in steps])]
        for number, layer in enumerate(self.layers):
            normed = _normalised(x.astype(np.float64), layer.attention_norm, config.rms_norm_eps)
            projected = (normed @ layer.query_key_value).reshape(count, -1, size)
            turned = _rotated(projected[:, :-kv_heads], cos, sin)
            query, key, value = turned[:, :-kv_heads], turned[:, -kv_heads:], projected[:, -kv_heads:]
            for block, start, rows in writings:
                end = start + rows.stop - rows.start
                block.keys[number, :, start:end] = key[rows].swapaxes(0, 1)
                block.values[number, :, start:end] = value[rows].swapaxes(0, 1)
            x = x + self._attend(number, query, readings) @ layer.output
            gate, up = np.split(_normalised(x, layer.mlp_norm, config.rms_norm_eps) @ layer.gate_up, 2, axis=1)
            x = x + gate / (1 + np.exp(-gate)) * up @ layer.down
        return x

    def logits(self, hidden: Array) -> Array:
        """[rows, vocab_size] for rows of what ``forward`` returns."""
        return _normalised(hidden, self.norm, self.config.rms_norm_eps) @ self.embeddings.T

    def logprobs(self, ids: Many[int], temperature: float = 1.0) -> NDArray[np.float64]:
        """Each token's logprob after those before it, by teacher forcing: [len(ids) − 1]."""
        sequence, told = Sequence(), []
        for start in range(0, len(ids), 256):
            told.append(self.logits(self.forward([(sequence, ids[start : start + 256])])))
        logprobs = log_softmax(np.concatenate(told)[:-1] / np.float32(temperature))
        return logprobs[np.arange(len(ids) - 1), list(ids[1:])]

    def _plan(
        self, steps: Many[tuple[Sequence, Many[int]]]
    ) -> tuple[NDArray[np.int64], list[_Reading], list[tuple[Block, int, slice]]]:
        """The rows' positions, which blocks they read and how far, and where their keys and values are written."""
        positions: list[int] = []
        readers: dict[int, list[tuple[Block, int, range]]] = {}
        writings = []
        for sequence, ids in steps:
            first, start = len(positions), len(sequence.tokens)
            written = 0
            while written < len(ids):
                block, used = sequence.blocks[-1] if sequence.blocks else (None, 0)
                if block is None or used < block.filled or used == BLOCK:
                    block, used = Block(self.config, start + written), 0
                else:
                    sequence.blocks.pop()
                more = min(BLOCK - used, len(ids) - written)
                sequence.blocks.append((block, used + more))
                block.filled = used + more
                writings.append((block, used, slice(first + written, first + written + more)))
                written += more
            positions += range(start, start + len(ids))
            sequence.tokens += ids
            for block, used in sequence.blocks:
                readers.setdefault(id(block), []).append((block, used, range(first, len(positions))))
        at = np.array(positions, np.int64)
        # A row's running softmax begins with its first block, of which it reads at least one token.
        readings = [_reading(found, at) for found in readers.values()]
        return at, sorted(readings, key=lambda reading: reading.block.start), writings

    def _attend(self, number: int, query: NDArray[np.float64], readings: list[_Reading]) -> Array:
        """What each row [rows, heads, head_dim] finds in its blocks: [rows, heads · head_dim]."""
        rows, heads, size = query.shape
        groups = self.config.num_key_value_heads
        query = np.ascontiguousarray(query.reshape(rows, groups, -1, size).swapaxes(0, 1))
        found: Array = np.zeros(query.shape, np.float32)
        total: Array = np.zeros((*query.shape[:3], 1), np.float32)
        peak = np.full(total.shape, -np.inf)
        for reading in readings:
            here = reading.rows
            keys = reading.block.keys[number, :, : reading.length]
            values = reading.block.values[number, :, : reading.length]
            asked = query[:, here]
            scores = (asked.reshape(groups, -1, size) @ keys.swapaxes(1, 2)).reshape(*asked.shape[:3], -1)
            if reading.bias is not None:
                scores += reading.bias
            before, now = peak[:, here], np.maximum(peak[:, here], scores.max(axis=3, keepdims=True))
            weights = np.subtract(scores, now, dtype=np.float32, casting="same_kind")
            np.exp(weights, out=weights)
            fade = np.exp(before - now).astype(np.float32)
            gained = (weights.reshape(groups, -1, reading.length) @ values).reshape(asked.shape)
            found[:, here] = found[:, here] * fade + gained
            total[:, here] = total[:, here] * fade + weights.sum(axis=3, keepdims=True)
            peak[:, here] = now
        found /= total
        return found.swapaxes(0, 1).reshape(rows, heads * size)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights, the matrices as [inputs, outputs]."""

    attention_norm: Array
    query_key_value: NDArray[np.float64]
    output: Array
    mlp_norm: Array
    gate_up: Array
    down: Array


def _reading(found: list[tuple[Block, int, range]], positions: NDArray[np.int64]) -> _Reading:
    block = found[0][0]
    rows = np.array([row for _, _, rows in found for row in rows])
    used = np.repeat([used for _, used, _ in found], [len(rows) for _, _, rows in found])
    lengths = np.minimum(used, positions[rows] + 1 - block.start)
    seen = lengths > 0
    rows, lengths = rows[seen], lengths[seen]
    longest = int(lengths.max())
    bias = None
    if lengths.min() < longest:
        beyond = np.arange(longest) >= lengths[:, None]
        bias = np.where(beyond, np.float32(-np.inf), np.float32(0))[None, :, None]
    whole = len(rows) == rows[-1] - rows[0] + 1
    return _Reading(block, slice(int(rows[0]), int(rows[-1]) + 1) if whole else rows, longest, bias)


def _read_weights(path: Path) -> dict[str, Array]:
    from safetensors.numpy import load_file

    try:
        return {name: value.astype(np.float32) for name, value in load_file(path).items()}
    except Exception as error:  # safetensors' own, OSError, TypeError for a type that numpy does not have
        raise CheckpointError(f"{path} can't be read ({error}): save the weights as float16 or float32") from error


def _columns(*matrices: Array) -> Array:
    return np.ascontiguousarray(np.concatenate(matrices).T)


def _normalised(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm (https://arxiv.org/abs/1910.07467)."""
    return x / np.sqrt(np.einsum("ij,ij->i", x, x)[:, None] / np.float32(x.shape[1]) + np.float32(eps)) * weight


def _rotated(x: NDArray[np.float64], cos: Array, sin: Array) -> NDArray[np.float64]:
    """Rotary position embeddings (https://arxiv.org/abs/2104.09864), the halves of a head as the pairs' two parts."""
    left, right = np.split(x, 2, axis=2)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=2)


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
