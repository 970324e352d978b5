"""Tables of results, shown as aligned text, Markdown or (step/lib/report.html.jinja) HTML."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ResultTable:
    """A table of formatted cells; all rows have as many cells as the head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[int] = ()
    """Indices of the columns that are right-aligned."""

    def __post_init__(self) -> None:
        """Raises ValueError for a row whose length differs from the head's."""
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"A row of {len(row)} cells in a table of {len(self.head)} columns: {row}")

    def text(self) -> str:
        """Aligned lines, two spaces between the columns."""
        return "\n".join("  ".join(cells).rstrip() for cells in self._aligned())

    def markdown(self) -> str:
        """A Markdown table whose source is aligned too."""
        head, *rows = self._aligned()
        rule = ["-" * (len(c) - 1) + (":" if i in self.numbers else "-") for i, c in enumerate(head)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))

    def _aligned(self) -> list[list[str]]:
        """Head and rows, each cell as wide as its column (three or more, as a Markdown rule needs)."""
        lines = [self.head, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        return [
            [c.rjust(w) if i in self.numbers else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        ]
