"""A plain Llama in torch: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied ends.

Architecture: Touvron et al. 2023, "LLaMA"; rotary positions: Su et al. 2021, "RoFormer".
Pairs of neighbouring dimensions are rotated together, as llama.cpp does it for this architecture,
so the tensors go into a GGUF file as they are, and parameters bear the names that they have there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tools.hive_tiny.shape import Shape, Weights

FUSED_FROM = 256  # tokens; longer rows go through torch's fused attention


def rotation(shape: Shape) -> Tensor:
    """The turn of every position and pair: complex64 of (context, head_size / 2)."""
    exponents = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    angles = torch.outer(torch.arange(shape.context), shape.rope_base**-exponents)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """x: (batch, heads, tokens, head_size), each neighbouring pair turned by its position."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[: x.shape[2]]).flatten(-2).to(x.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention with shared key heads; all are (batch, heads, tokens, head_size).

    Torch's fused kernel is slow backwards over short rows on a CPU, so those are written out.
    """
    batch, heads, tokens, size = queries.shape
    if tokens > FUSED_FROM:
        return functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        )
    shared = keys.shape[1]
    scores = queries.reshape(batch, shared, -1, size) @ keys.transpose(-1, -2) * size**-0.5
    future = torch.full((tokens, tokens), float("-inf"), dtype=scores.dtype).triu(1)
    shares = torch.softmax(scores.view(batch, shared, -1, tokens, tokens) + future, dim=-1)
    mixed = shares.to(values.dtype).view(batch, shared, -1, tokens) @ values
    return mixed.view(batch, heads, tokens, size)


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each behind a norm and added back."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self.attn_norm = nn.RMSNorm(shape.hidden, eps=shape.norm_epsilon)
        self.attn_q = nn.Linear(shape.hidden, queries, bias=False)
        self.attn_k = nn.Linear(shape.hidden, keys, bias=False)
        self.attn_v = nn.Linear(shape.hidden, keys, bias=False)
        self.attn_output = nn.Linear(queries, shape.hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.hidden, eps=shape.norm_epsilon)
        self.ffn_gate = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.ffn_up = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.ffn_down = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """x: (batch, tokens, hidden) in and out."""
        batch, tokens, _ = x.shape
        h = self.attn_norm(x)

        def heads(projected: Tensor) -> Tensor:
            return projected.view(batch, tokens, -1, self.shape.head_size).transpose(1, 2)

        attended = attend(
            rotate(heads(self.attn_q(h)), turns),
            rotate(heads(self.attn_k(h)), turns),
            heads(self.attn_v(h)),
        )
        x = x + self.attn_output(attended.transpose(1, 2).reshape(batch, tokens, -1))
        h = self.ffn_norm(x)
        gated: Tensor = self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))
        return x + gated


class Llama(nn.Module):
    """Token ids in, logits of the next token out; the output layer is the embedding."""

    def __init__(self, shape: Shape, weights: Weights | None = None) -> None:
        """weights: what `weights` gave; random ones without."""
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocabulary, shape.hidden)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.hidden, eps=shape.norm_epsilon)
        self.register_buffer("turns", rotation(shape), persistent=False)
        if weights is None:
            self._randomize()
        else:
            self.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})

    def _randomize(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                scale = (2 * self.shape.layers) ** -0.5 if into_residual else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def weights(self) -> Weights:
        """The parameters by the names that they have in GGUF; matrices are (out, in)."""
        return {name: p.detach().numpy().copy() for name, p in self.named_parameters()}

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 of (batch, tokens); gives the last norm's output, (batch, tokens, hidden)."""
        x: Tensor = self.token_embd(ids)
        for block in self.blk:
            x = block(x, self.turns)
        normed: Tensor = self.output_norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., hidden) as `forward` gives it; the logits are (..., vocabulary)."""
        return functional.linear(hidden, self.token_embd.weight)


@torch.inference_mode()
def greedy(model: Llama, ids: list[int], end: int, limit: int) -> list[int]:
    """The most likely continuation of the ids: up to `limit` tokens, `end` not included."""
    out: list[int] = []
    while len(out) < limit and len(ids) + len(out) < model.shape.context:
        hidden = model(torch.tensor([ids + out]))[0, -1]
        token = int(model.logits(hidden).argmax())
        if token == end:
            break
        out.append(token)
    return out
