"""Tables that other people wrote (.csv, .tsv, .jsonl): every error names the file, the line and what to do."""
import csv
import json
import math
import typing
from pathlib import Path

from common.config import fail


def stop_at(path: Path, line: int, problem: str, *, do: str) -> typing.NoReturn:
    """Stop: `path line 7: problem: do`."""
    fail(f"import_from: {path} line {line}: {problem}: {do}")


def read_text(path: Path) -> str:
    """The file as UTF-8, or stop with one line."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"import_from: {path}: cannot be read as UTF-8 text ({error}): give an existing text file")


def read_table(path: Path, needed: tuple[str, ...]) -> list[tuple[int, dict]]:
    """(line number, row) of every line; the needed columns are there in each, and no cell is missing."""
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        fail(f"import_from: {path}: expected a table that ends in .csv, .tsv or .jsonl: rename or convert it")
    rows = read_json_lines(path) if path.suffix == ".jsonl" else read_cells(path)
    if not rows:
        stop_at(path, 1, f"no rows; expected the columns {', '.join(needed)} and a line for each entry", do="fill it in")
    for line, row in rows:
        for key in needed:
            if row.get(key) in (None, ""):
                stop_at(path, line, f"{key!r} is missing; expected {', '.join(needed)}", do="add it")
    return rows


def read_cells(path: Path) -> list[tuple[int, dict]]:
    """Rows of a .csv or .tsv whose first line names the columns; all cells are text."""
    text = read_text(path)
    reader = csv.reader(text.splitlines(keepends=True), delimiter="," if path.suffix == ".csv" else "\t", strict=True)
    rows, head = [], None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if head is None:
                head = cells
                if len(set(head)) < len(head):
                    stop_at(path, reader.line_num, "a column is named twice", do="give each column its own name")
            elif len(cells) != len(head) and cells:
                stop_at(path, reader.line_num, f"{len(cells)} cells; expected {len(head)}: {', '.join(head)}",
                     do="quote cells that hold the separator")
            elif cells:
                rows.append((reader.line_num, dict(zip(head, cells))))
    except csv.Error as error:
        stop_at(path, reader.line_num, f"not a well-formed table ({error})", do="check the quotes")
    return rows


def read_json_lines(path: Path) -> list[tuple[int, dict]]:
    """Objects of a .jsonl file, one a line."""
    rows = []
    for line, text in enumerate(read_text(path).splitlines(), 1):
        if text.strip():
            row = parse_json(text, path, line)
            if not isinstance(row, dict):
                stop_at(path, line, f"expected a JSON object, got {type(row).__name__}", do="repair the line")
            rows.append((line, row))
    return rows


def parse_json(text: str, path: Path, line: int) -> object:
    """What a JSON text holds; line: of the file, where the text begins."""
    try:
        return json.loads(text)
    except ValueError as error:
        stop_at(path, line, f"not JSON ({error})", do="repair or remove it")


def number(value: object, path: Path, line: int, *, what: str) -> float:
    """A finite number."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = math.nan
    if not math.isfinite(result) or isinstance(value, bool):
        stop_at(path, line, f"{what} should be a finite number, got {value!r}", do="correct it")
    return result


def choice(value: object, among: tuple[str, ...], path: Path, *, line: int, what: str) -> str:
    """One of the words."""
    if value not in among:
        stop_at(path, line, f"{what} should be one of {', '.join(among)}, got {value!r}", do="correct it")
    return value


def picture(name: str, root: Path, path: Path, *, line: int) -> Path:
    """The file that a cell names, relative to root."""
    if not isinstance(name, str) or not (root / name).is_file():
        stop_at(path, line, f"there is no picture {root / str(name)}", do="add the file or correct the name")
    return root / name
