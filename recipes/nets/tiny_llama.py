"""Language models of the Llama-2 type in the names of llama2.c: RMSNorm, rotary positions, SwiGLU, a tied embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, shared_heads: int) -> None:
        super().__init__()
        self.heads, self.shared_heads, self.size = heads, shared_heads, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, shared_heads * self.size, bias=False)
        self.wv = nn.Linear(width, shared_heads * self.size, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            layer(x).view(batch, length, -1, self.size).transpose(1, 2) for layer in (self.wq, self.wk, self.wv)
        )
        key, value = (t.repeat_interleave(self.heads // self.shared_heads, 1) for t in (rotate(key), value))
        mixed = F.scaled_dot_product_attention(rotate(query), key, value, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(batch, length, width))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions on interleaved pairs; x [batch, heads, length, size]."""
    length, size = x.shape[-2:]
    places = torch.arange(length, device=x.device)
    angle = torch.outer(places, 10000.0 ** -(torch.arange(0, size, 2, device=x.device) / size))
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1).flatten(-2)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaLayer(nn.Module):
    def __init__(self, width: int, heads: int, shared_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, heads, shared_heads)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Stories(nn.Module):
    """The 260K-parameter Llama-2-type model of llama2.c; the embedding is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(512, 64)
        self.layers = nn.Sequential(*(LlamaLayer(64, 8, 4, 172) for _ in range(5)))
        self.norm = nn.RMSNorm(64, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(self.layers(self.tok_embeddings(tokens))), self.tok_embeddings.weight)


def stories260k() -> nn.Module:
    return Stories()
