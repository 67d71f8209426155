"""How implementations that know one head count see few key heads and many value heads."""

import torch


def expand_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, S, Hx, D]`` to ``[B, H, S, D]``: head i reads head i % Hx. One head is expanded with
    stride 0, a few are copied."""
    x = x.transpose(1, 2)
    if x.shape[1] == heads:
        return x
    repeated = x[:, None].expand(-1, heads // x.shape[1], -1, -1, -1)
    return repeated.flatten(1, 2) if x.shape[1] > 1 else repeated[:, :, 0]
