"""Print the figure of ddts.md: the level of the decay tree that each pair of positions meets at."""

import torch

from rodimus_kernels.reference import level_mask


def figure(chunk: int) -> str:
    """Rows i, columns j <= i; the diagonal carries no gate."""
    levels = chunk.bit_length() - 1
    meets = torch.stack([level_mask(chunk, level) for level in range(levels)])
    rows = []
    for i in range(chunk):
        cells = [str(meets[:, i, j].int().argmax().item()) for j in range(i)]
        rows.append(f"{i:2} | {' '.join([*cells, '.'])}")
    return "\n".join(rows)


if __name__ == "__main__":
    print(figure(16))
