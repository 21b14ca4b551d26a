"""A page of a report as blocks, written twice: as Markdown, and as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MIME = {".png": "image/png", ".jpg": "image/jpeg"}


@dataclass(frozen=True)
class Text:
    """A paragraph; a strong one is the page's headline or a warning."""

    words: str
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row.

    Attributes:
        header: names of the columns.
        rows: their cells.
        strong: numbers of rows to stress.
        strong_cells: single cells to stress, as row and column.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: Sequence[int] = ()
    strong_cells: Collection[tuple[int, int]] = ()

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError(f"a row has other columns than {self.header}")


@dataclass(frozen=True)
class Picture:
    """An image file in or below the page's folder, and what it shows; of a JPEG beside it HTML holds the smaller."""

    path: Path
    shows: str


@dataclass(frozen=True)
class Code:
    """Lines to type."""

    lines: str


@dataclass(frozen=True)
class Files:
    """Further files beside the page, by what they hold."""

    paths: dict[str, Path]


Block = Text | Table | Picture | Code | Files


@dataclass(frozen=True)
class Section:
    """Blocks under a title."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A titled page: blocks at its head, then sections; sections without blocks are left out."""

    title: str
    head: Sequence[Block]
    sections: Sequence[Section] = field(default_factory=list)

    def write(self, folder: Path, name: str) -> None:
        """Write ``name.md`` and ``name.html`` into `folder`.

        Raises:
            OSError: the folder cannot be written, or a picture not read.
        """
        (folder / f"{name}.md").write_text(self.markdown(folder), encoding="utf-8")
        (folder / f"{name}.html").write_text(self.html(folder), encoding="utf-8")

    def markdown(self, folder: Path, alone: bool = False) -> str:
        """The page as Markdown, with paths relative to `folder`; `alone` leaves out pictures and files."""
        parts = [f"# {plain(self.title)}", *(_markdown(block, folder) for block in self.head)]
        for section in self._filled():
            blocks = [block for block in section.blocks if not (alone and isinstance(block, Picture | Files))]
            parts += [f"## {plain(section.title)}"] * bool(blocks) + [_markdown(block, folder) for block in blocks]
        return "\n\n".join(parts) + "\n"

    def html(self, folder: Path) -> str:
        """The page as HTML, its pictures inside; other files are linked relative to `folder`."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        loader = PackageLoader("cifar_dist")
        environment = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters |= {"inside": _data_address, "kind": lambda block: type(block).__name__}
        environment.filters["beside"] = lambda path: path.relative_to(folder).as_posix()
        environment.filters["numeric"] = _numeric_columns
        page = environment.get_template("page.html.j2")
        return page.render(title=self.title, head=self.head, sections=self._filled())

    def _filled(self) -> list[Section]:
        return [section for section in self.sections if section.blocks]


def _numeric_columns(table: Table) -> set[int]:
    """Columns, but the first, with nothing in them but numbers, which are read best from their right end."""
    number = re.compile(r"[-+±]?[\d.,:]+( ?[%a-zA-Z×/]+)?( ± [\d.]+)?|–|< 0.001|")
    columns = range(1, len(table.header))
    return {k for k in columns if table.rows and all(number.fullmatch(row[k]) for row in table.rows)}


def _data_address(path: Path) -> str:
    """A picture's content as an address, so that a page needs no file beside it."""
    path = min((found for found in (path, path.with_suffix(".jpg")) if found.exists()), key=lambda f: f.stat().st_size)
    return f"data:{MIME[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def plain(text: str) -> str:
    """Text that Markdown leaves as it is, in a table too."""
    joined = re.sub(r"([\\`*~<>|\[\]]|&(?=#?\w+;))", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_+|_+(?![^\W_])", lambda found: r"\_" * len(found[0]), joined)  # not within words


def _markdown(block: Block, folder: Path) -> str:
    if isinstance(block, Text):
        return f"**{plain(block.words)}**" if block.strong else plain(block.words)
    if isinstance(block, Picture):
        return f"![{plain(block.shows)}]({block.path.relative_to(folder).as_posix()})"
    if isinstance(block, Code):
        return f"```sh\n{block.lines}\n```"
    if isinstance(block, Files):
        named = (f"{plain(w)} in [{p.name}]({p.relative_to(folder).as_posix()})" for w, p in block.paths.items())
        return f"Beside this page: {', '.join(named)}."
    rows = [[plain(cell) for cell in row] for row in block.rows]
    for number in block.strong:
        rows[number] = [f"**{cell}**" if cell else "" for cell in rows[number]]
    for number, column in block.strong_cells:
        rows[number][column] = f"**{rows[number][column]}**"
    lines = [[plain(name) for name in block.header], ["---"] * len(block.header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
