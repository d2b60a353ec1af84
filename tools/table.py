"""Tables that read well both as plain text and as Markdown."""

from collections.abc import Iterable


def table(columns: list[str], rows: Iterable[list[str]], *, numbers: bool = False) -> str:
    """A Markdown table with aligned columns: to the left, or with ``numbers`` to the right from the second one on."""
    rows = list(rows)
    widths = [max(2, *map(len, column)) for column in zip(columns, *rows, strict=True)]
    sides = ["<", *(">" if numbers else "<") * (len(columns) - 1)]
    rule = [f"{':':-{side}{width}}" for side, width in zip(sides, widths, strict=True)]
    return "\n".join(
        f"| {' | '.join(f'{cell:{side}{width}}' for cell, side, width in zip(line, sides, widths, strict=True))} |"
        for line in [columns, rule, *rows]
    )
