"""A table of strings, for a terminal and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """A table of strings; the first column holds names."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def as_rich(self) -> Table:
        """For a terminal, without empty columns."""
        table = Table(title=self.title, title_justify="left", show_edge=False, pad_edge=False)
        kept = self._filled()
        for index in kept:
            left = index == 0  # names are not wrapped; a narrow terminal wraps values
            table.add_column(self.header[index], justify="left" if left else "right", no_wrap=left)
        for row in self.rows:
            table.add_row(*(row[index] for index in kept))
        return table

    def as_markdown(self) -> str:
        """For a Markdown file, without empty columns."""
        kept = self._filled()
        lines = ["| " + " | ".join(row[i] for i in kept) + " |" for row in (self.header, *self.rows)]
        lines.insert(1, "|" + "|".join("---" if i == 0 else "---:" for i in kept) + "|")
        return f"**{self.title}**\n\n" + "\n".join(lines) + "\n"

    def _filled(self) -> list[int]:
        return [i for i in range(len(self.header)) if i == 0 or any(row[i] for row in self.rows)]
