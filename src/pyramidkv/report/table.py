"""A table as a value, and its three renderers: terminal (rich), Markdown, HTML. Others decide what goes into it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

Tone = Literal["", "better", "worse", "missing"]
_SHORT = 24  # characters of small print that a narrow column should not break
_WORD = 22  # characters of a word in the first column that a narrow terminal should not break
_DETAIL = 14  # and in the others
_STYLES: dict[Tone, str] = {"": "", "better": "green", "worse": "red", "missing": "dim"}


@dataclass(frozen=True)
class Cell:
    """What a cell says, what it adds in small print, and how a reader should take it (never by colour alone)."""

    value: str
    detail: str = ""
    tone: Tone = ""


NOT_MEASURED = Cell("not measured", tone="missing")


@dataclass(frozen=True)
class Table:
    """A titled grid of cells with notes below; every row has one cell for each column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def rich(self, width: int = 80) -> Group:
        """For a terminal of so many columns. Cells are plain text: square brackets in them are not markup.

        Columns that do not fit beside the others follow below, each time with the first column.
        """
        grids = [self._grid(part, width) for part in self._parts(width)]
        grids[0].title = Text(self.title)
        if self.notes:
            grids[-1].caption = Text("\n".join(self.notes))
        return Group(*grids)

    def _parts(self, width: int) -> list[list[int]]:
        """The columns of each grid, the first of the table always among them."""
        parts = [[0]]
        for index in range(1, len(self.columns)):
            if len(parts[-1]) > 1 and sum(self._least(i) for i in (*parts[-1], index)) > _room(
                width, len(parts[-1]) + 1
            ):
                parts.append([0])
            parts[-1].append(index)
        return parts

    def _texts(self, index: int) -> list[str]:
        return [self.columns[index], *(line for row in self.rows for line in (row[index].value, row[index].detail))]

    def _least(self, index: int) -> int:
        """Characters of the longest word, or short value, in a column that should not be broken."""
        most = _DETAIL if index else _WORD
        longest = max(len(word) for text in self._texts(index) for word in text.split() or [""])
        values = [len(row[index].value) for row in self.rows if len(row[index].value) <= most]
        return max(min(longest, most), *values, 1)

    def _widths(self, columns: Sequence[int], room: int) -> list[int]:
        """Characters of each column: as many as it can use, but in the sum no more than there is room for."""
        most = [max(map(len, self._texts(index))) for index in columns]
        widths = [self._least(index) for index in columns]
        while sum(widths) < min(room, sum(most)):
            narrowest = min(w for w, much in zip(widths, most, strict=True) if w < much)
            widths[next(i for i, w in enumerate(widths) if w == narrowest < most[i])] += 1
        while sum(widths) > room and max(widths) > 1:
            widths[widths.index(max(widths))] -= 1
        return widths

    def _grid(self, columns: Sequence[int], width: int) -> RichTable:
        grid = RichTable(title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD)
        for index, wide in zip(columns, self._widths(columns, _room(width, len(columns))), strict=True):
            justify: Literal["left", "right"] = "right" if index else "left"
            grid.add_column(Text(self.columns[index]), justify=justify, overflow="fold", width=wide)
        for row in self.rows:
            grid.add_row(*(_rich_cell(row[index]) for index in columns))
        return grid

    def markdown(self) -> str:
        """GitHub Markdown, the title in bold above and the notes in a list below."""
        lines = [f"**{escape_markdown(self.title)}**", ""]
        lines.append(_markdown_row([escape_markdown(column) for column in self.columns]))
        lines.append(_markdown_row(["---" if index == 0 else "---:" for index in range(len(self.columns))]))
        lines += [_markdown_row([_markdown_cell(cell) for cell in row]) for row in self.rows]
        lines += ["", *(f"- {escape_markdown(note)}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """A `<figure>`, everything in it escaped; the table scrolls in a box of its own where a screen is narrow."""
        head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in self.columns)
        body = "\n".join(
            f'<tr><th scope="row">{_html_cell(row[0])}</th>'
            + "".join(f"<td>{_html_cell(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        notes = f'<ul class="notes">{notes}</ul>' if notes else ""
        return (
            f"<figure>\n<figcaption>{html.escape(self.title)}</figcaption>\n"
            f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
            f"</table></div>\n{notes}\n</figure>"
        )


def _room(width: int, columns: int) -> int:
    """Characters for the cells of a line: each column has a space on each side, and there is one at every border."""
    return width - 3 * columns - 1


def escape_markdown(text: str) -> str:
    """Text that GitHub Markdown shows as it stands, in a table cell as well: one line, no HTML, no links."""
    for plain, escaped in (
        ("\\", "\\\\"),
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("*", "\\*"),
        ("](", "]\\("),
    ):
        text = text.replace(plain, escaped)
    return " ".join(text.split())


def _rich_cell(cell: Cell) -> Text:
    text = Text(cell.value, style=_STYLES[cell.tone])
    return text.append(f"\n{cell.detail}", style="dim") if cell.detail else text


def _markdown_cell(cell: Cell) -> str:
    value = escape_markdown(cell.value)
    return f"{value} ({escape_markdown(cell.detail)})" if cell.detail else value


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _html_cell(cell: Cell) -> str:
    value = f'<span class="value {cell.tone}">{html.escape(cell.value)}</span>'
    short = ' class="short"' if len(cell.detail) <= _SHORT else ""
    return f"{value}<small{short}>{html.escape(cell.detail)}</small>" if cell.detail else value
