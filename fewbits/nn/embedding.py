"""The embedding whose weight gradient is summed in fp32."""

from __future__ import annotations

from torch import Tensor, nn

from fewbits.numerics.embedding import embedding


class Embedding(nn.Embedding):
    """`nn.Embedding` with the gradient of the weight summed in fp32; torch's rarer options keep torch's kernel."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] int64 -> [..., embedding_dim]."""
        if self.padding_idx is not None or self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            return super().forward(ids)
        return embedding(ids, self.weight)
