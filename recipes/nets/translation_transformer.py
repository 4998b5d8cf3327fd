"""An encoder-decoder Transformer (Vaswani et al. 2017, arXiv 1706.03762) for short sentences.

It differs from the paper in normalizing before each sublayer, as Xiong et al. 2020 (arXiv 2002.04745), which trains
without a long warm-up. One embedding serves source, target and output, and positions are sinusoids.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.size, self.dropout = width // heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """What `x` draws from `context`: where `mask` [batch, 1, 1, context] holds, without one from what came before.

        x, context  [batch, length, width]
        """
        batch, length, width = x.shape
        query, key, value = (
            layer(source).view(batch, -1, width // self.size, self.size).transpose(1, 2)
            for layer, source in ((self.q, x), (self.k, context), (self.v, context))
        )
        drop = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, mask, drop, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.dropout(F.relu(self.expand(x))))


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.feed = FeedForward(width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention(y, y, mask))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.cross_norm, self.feed_norm = (nn.LayerNorm(width) for _ in range(3))
        self.attention = Attention(width, heads, dropout)
        self.cross = Attention(width, heads, dropout)
        self.feed = FeedForward(width, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention(y, y, None))
        x = x + self.dropout(self.cross(self.cross_norm(x), memory, mask))
        return x + self.dropout(self.feed(self.feed_norm(x)))


class TranslationTransformer(nn.Module):
    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, hidden: int, dropout: float, length: int
    ) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(f"width {width} is not even, or no multiple of the {heads} heads")
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, hidden, dropout) for _ in range(layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, hidden, dropout) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", sinusoids(length, width), persistent=False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Logits [samples, target length, vocabulary] of the token after each of `decoder_input_ids`.

        input_ids          int64 [samples, source length]
        attention_mask     [samples, source length], 0 at padding
        decoder_input_ids  int64 [samples, target length]: the begin token, then the translation so far
        """
        return self.decode(self.encode(input_ids, attention_mask), attention_mask, decoder_input_ids)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The sources as the decoder sees them: [samples, source length, width]."""
        mask = attention_mask.bool()[:, None, None]
        x = self.embed(input_ids)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x)

    def decode(self, memory: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """`forward` from what `encode` gave."""
        mask = attention_mask.bool()[:, None, None]
        x = self.embed(decoder_input_ids)
        for layer in self.decoder:
            x = layer(x, memory, mask)
        return F.linear(self.decoder_norm(x), self.embedding.weight)

    def embed(self, ids: Tensor) -> Tensor:
        # Counted from the ids, as torch.fx cannot follow a length into a slice.
        places = torch.ones_like(ids).cumsum(1) - 1
        return self.dropout(self.embedding(ids) * math.sqrt(self.embedding.embedding_dim) + self.positions[places])


def sinusoids(length: int, width: int) -> Tensor:
    """Position signals [length, width]: sines, then cosines, of wavelengths from 2 pi to 20000 pi."""
    angle = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, width, 2) / width))
    return torch.cat((angle.sin(), angle.cos()), 1)


def translation_transformer(
    vocabulary: int,
    width: int = 256,
    layers: int = 3,
    heads: int = 4,
    hidden: int = 1024,
    dropout: float = 0.1,
    length: int = 128,
) -> nn.Module:
    """`layers` in the encoder and as many in the decoder; sentences of at most `length` tokens."""
    return TranslationTransformer(vocabulary, width, layers, heads, hidden, dropout, length)
