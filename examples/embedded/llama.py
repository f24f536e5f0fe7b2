"""A Llama in PyTorch whose batches share a prompt: what teaches the model, and what trains it.

Hermes' first prompt is the same 2,500 tokens in every rollout. They go through the model once a step, and their keys
and values serve each row of the batch, with their gradients. The format of files is that of Hugging Face's
``LlamaForCausalLM``, and so is the arithmetic, in float32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu

__all__ = ["Cache", "Llama"]

Cache = list[tuple[Tensor, Tensor]]


class Llama(nn.Module):
    """
    Args:
        config: as ``config.json`` has it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.heads, self.groups = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = config["head_dim"]
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
        for number in range(config["num_hidden_layers"]):
            layer = {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (self.heads * self.width, hidden),
                "self_attn.k_proj": (self.groups * self.width, hidden),
                "self_attn.v_proj": (self.groups * self.width, hidden),
                "self_attn.o_proj": (hidden, self.heads * self.width),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }
            shapes.update({f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()})
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "/"): torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02
                for name, shape in shapes.items()
            }
        )

    @classmethod
    def load(cls, folder: Path | str) -> Llama:
        model = cls(json.loads(Path(folder, "config.json").read_text()))
        stored = load_file(Path(folder, "model.safetensors"))
        with torch.no_grad():
            for name, weight in model.weights.items():
                weight.copy_(stored[name.replace("/", ".")])
        return model

    def save(self, folder: Path | str, like: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Write a checkpoint, with the tokenizer and all else of the one at ``like``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(like).iterdir():
            if file.suffix in (".json", ".jinja") and file.parent != folder:
                shutil.copy(file, folder / file.name)
        config = self.config | {"dtype": str(dtype).removeprefix("torch.")}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name.replace("/", "."): weight.detach().to(dtype) for name, weight in self.weights.items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    def forward(self, prefix: Tensor, ids: Tensor) -> Tensor:
        """The hidden states of ``ids: [rows, length]``, each row behind ``prefix: [prefix_length]``.

        Behind a row's own tokens anything may stand: nothing looks ahead. :meth:`logits` makes logits of hidden states.
        """
        return self.behind(self.read(prefix), ids)

    def read(self, prefix: Tensor) -> Cache:
        """The keys and values of ``prefix: [prefix_length]``, layer by layer."""
        cache: Cache = []
        self._run(prefix[None], 0, cache, fill=True)
        return cache

    def behind(self, cache: Cache, ids: Tensor) -> Tensor:
        """What :meth:`forward` returns, behind what was read."""
        return self._run(ids, cache[0][0].shape[2], cache, fill=False)

    def logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weights["model/embed_tokens/weight"])

    def _run(self, ids: Tensor, start: int, cache: Cache, *, fill: bool) -> Tensor:
        rows, length = ids.shape
        states = embedding(ids, self.weights["model/embed_tokens/weight"])
        turn = self._rotation(torch.arange(start, start + length))
        mask = None if fill else torch.ones(length, start + length, dtype=torch.bool).tril(start)
        for number in range(self.config["num_hidden_layers"]):

            def weight(name: str, number: int = number) -> Tensor:
                return self.weights[f"model/layers/{number}/{name}/weight"]

            normed = self._norm(states, weight("input_layernorm"))
            query, key, value = (
                linear(normed, weight(f"self_attn/{name}_proj")).view(rows, length, -1, self.width).transpose(1, 2)
                for name in "qkv"
            )
            query, key = rotate(query, turn), rotate(key, turn)
            if fill:
                cache.append((key, value))
            else:
                key, value = (
                    torch.cat([shared.expand(rows, -1, -1, -1), own], dim=2)
                    for shared, own in zip(cache[number], (key, value), strict=True)
                )
            key, value = (states.repeat_interleave(self.heads // self.groups, dim=1) for states in (key, value))
            attended = scaled_dot_product_attention(query, key, value, mask, is_causal=fill)
            states = states + linear(attended.transpose(1, 2).reshape(rows, length, -1), weight("self_attn/o_proj"))
            normed = self._norm(states, weight("post_attention_layernorm"))
            inner = silu(linear(normed, weight("mlp/gate_proj"))) * linear(normed, weight("mlp/up_proj"))
            states = states + linear(inner, weight("mlp/down_proj"))
        return self._norm(states, self.weights["model/norm/weight"])

    def _norm(self, states: Tensor, weight: Tensor) -> Tensor:
        scale = torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return weight * (states * scale)

    def _rotation(self, places: Tensor) -> tuple[Tensor, Tensor]:
        # In just these steps, as Hugging Face has them: thousands of tokens on, the last bit of a frequency shows.
        frequencies = 1.0 / self.config["rope_theta"] ** (torch.arange(0, self.width, 2).float() / self.width)
        angles = torch.outer(places.float(), frequencies).repeat(1, 2)
        return angles.cos(), angles.sin()


def rotate(states: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embeddings (https://arxiv.org/abs/2104.09864), with the halves of Hugging Face's layout."""
    cosine, sine = turn
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine
