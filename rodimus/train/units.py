"""Numbers for people."""


def in_unit(unit: str, digits: int, *numbers: float) -> tuple[list[str], str]:
    """Numbers as text in the largest unit of which one has as much as 1, and that unit."""
    size, prefix = next((x for x in ((1e9, "G"), (1e6, "M")) if max(numbers) >= x[0]), (1e3, "k"))
    return [f"{number / size:,.{digits}f}" for number in numbers], prefix + unit
