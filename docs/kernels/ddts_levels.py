"""Print the figure of ddts.md: the level of the decay tree that each pair of positions meets at."""


def figure(chunk: int) -> str:
    """Rows i, columns j <= i; the diagonal carries no gate."""
    level = lambda i, j: str((i ^ j).bit_length() - 1)
    rows = (" ".join([*(level(i, j) for j in range(i)), "."]) for i in range(chunk))
    return "\n".join(f"{i:2} | {row}" for i, row in enumerate(rows))


if __name__ == "__main__":
    print(figure(16))
