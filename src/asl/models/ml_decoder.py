"""ML-Decoder: a head in which every class looks at the whole map of features (arXiv 2111.12933)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear, relu

# Those of the official code, which has no options for them.
WIDTH, FEED_FORWARD, ATTENTION_HEADS, DROPOUT, QUERIES = 768, 2048, 8, 0.1, 100


class MLDecoder(nn.Module):
    """Unpooled features -> logits, by cross-attention of a few queries (section 3 of the paper).

    There are `num_queries` of them, or one per class if there are fewer classes. They are drawn
    once and never trained; each answers for as many classes (the last for fewer, or for none).
    The names of the tensors, and how they are drawn, are those of the official code.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_queries: int = QUERIES,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.decoder = _Decoder(in_features, num_classes, min(num_queries, num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """Map features to logits (B, C), which are float32 under autocast too.

        The features are a map (B, F, H, W), or (B, H, W, F) with `channels_last`, or tokens
        (B, N, F).
        """
        logits: Tensor = self.decoder(self._tokens(features))
        return logits

    def attention(self, features: Tensor) -> Tensor:
        """How much of its attention the query of each class gives to each token: (B, C, N).

        The mean over the heads; the N weights of a class add up to 1. Classes that share a query
        have the same. Computed beside `forward`, whose kernel does not tell.
        """
        return self.decoder.attention(self._tokens(features))

    def _tokens(self, features: Tensor) -> Tensor:
        if features.ndim == 4 and not self.channels_last:
            features = features.movedim(1, -1)
        return features.flatten(1, -2)


class _Decoder(nn.Module):
    def __init__(self, in_features: int, num_classes: int, num_queries: int) -> None:
        super().__init__()
        self.embed_standart = nn.Linear(in_features, WIDTH)
        self.query_embed = nn.Embedding(num_queries, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList([_Layer()])
        each = -(-num_classes // num_queries)
        self.duplicate_pooling = nn.Parameter(torch.empty(num_queries, WIDTH, each))
        self.duplicate_pooling_bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.xavier_normal_(self.duplicate_pooling)

    def attention(self, tokens: Tensor) -> Tensor:
        layer: Any = self.layers[0]
        embedded = relu(self.embed_standart(tokens))
        queries = self.query_embed.weight.expand(tokens.shape[0], -1, -1)
        queries = layer.norm1(queries + layer.dropout(queries))
        by_query: Tensor = layer.multihead_attn.weights(queries, embedded)
        each = self.duplicate_pooling.shape[2]
        return by_query.repeat_interleave(each, dim=1)[:, : len(self.duplicate_pooling_bias)]

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = relu(self.embed_standart(tokens))
        # `len(tokens)` would become a constant of the graph that is exported.
        queries = self.query_embed.weight.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            queries = layer(queries, embedded)
        # Logits of bfloat16 would tie. Float32 is cheap here: with 9,605 classes and a map of 7 x 7
        # this product has one in a hundred of the decoder's multiplications.
        with torch.autocast(tokens.device.type, enabled=False):
            queries = queries.to(self.duplicate_pooling.dtype)
            by_query = torch.bmm(queries.transpose(0, 1), self.duplicate_pooling)
            logits = by_query.transpose(0, 1).flatten(1)
            return logits[:, : len(self.duplicate_pooling_bias)] + self.duplicate_pooling_bias


class _Layer(nn.Module):
    """A transformer's decoder layer without self-attention: queries that are fixed need none."""

    def __init__(self) -> None:
        super().__init__()
        self.multihead_attn = _CrossAttention()
        self.linear1 = nn.Linear(WIDTH, FEED_FORWARD)
        self.linear2 = nn.Linear(FEED_FORWARD, WIDTH)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        queries = self.norm1(queries + self.dropout(queries))
        queries = self.norm2(queries + self.dropout(self.multihead_attn(queries, tokens)))
        hidden = self.dropout(relu(self.linear1(queries)))
        result: Tensor = self.norm3(queries + self.dropout(self.linear2(hidden)))
        return result


class _CrossAttention(nn.Module):
    """What `nn.MultiheadAttention` computes, with its names of tensors, by the fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * WIDTH, WIDTH))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.out_proj = nn.Linear(WIDTH, WIDTH)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        query, key, value = self._projected(queries, tokens)
        # By its full name, which is replaced where a training is rehearsed.
        attended = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=DROPOUT if self.training else 0.0
        )
        result: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return result

    def weights(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Those that `forward` gives to the tokens, without dropout: (B, Q, N), mean of heads."""
        query, key, _ = self._projected(queries, tokens)
        similarity: Tensor = query @ key.mT / query.shape[-1] ** 0.5
        return similarity.softmax(dim=-1).mean(dim=1)

    def _projected(self, queries: Tensor, tokens: Tensor) -> list[Tensor]:
        """Query, key and value, each (B, heads, Q or N, width of a head)."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        query = linear(queries, weight[:WIDTH], bias[:WIDTH])
        key, value = linear(tokens, weight[WIDTH:], bias[WIDTH:]).chunk(2, dim=-1)
        return [
            each.view(*each.shape[:2], ATTENTION_HEADS, -1).transpose(1, 2)
            for each in (query, key, value)
        ]
