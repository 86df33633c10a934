"""One HTML page of a results folder: question, answer, figures, uncertainty and command, from the executed notebooks.

`python -m fmfa.report runs/quick --shown irra-0 fmfa-0`

The notebooks' cells tagged `report` (all of a notebook without such cells) are put into one notebook, without their
code, and exported once; those tagged `answer` come first, and the sections (`## ...`) below them are folded. A section
whose code shows neither table nor figure is left out. The page needs no server and loads nothing; what is not a
notebook's own output is escaped.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

from fmfa.errors import ConfigError
from fmfa.files import read_json, said_plainly, whole_file
from fmfa.notebook import in_project, notebook_command, status_path
from fmfa.records import read_record

TAKEN, ANSWER = "report", "answer"
TEMPLATE = Path(__file__).with_suffix(".html.j2")


def write_report(results: str | Path, output: str | Path = "", shown: Sequence[str] = ()) -> Path:
    """Build the page of a results folder.

    Args:
        results: folder with the executed notebooks `data-*.ipynb`, `comparison.ipynb` and `pictures.ipynb`; folders
            below it that have a comparison of their own (another data set, a cross-domain test) follow.
        output: the page; empty: `report.html` in `results`.
        shown: names of runs whose evaluation the page shows; those that are not there are left out.

    Returns:
        The page's path.

    Raises:
        ConfigError: no executed notebook in the folder, or the page cannot be written.
    """
    results, output = Path(results), Path(output or Path(results) / "report.html")
    groups = [results, *sorted({path.parent for path in results.glob("*/**/comparison.ipynb")} - {results})]
    cells: list[NotebookNode] = []
    for group in groups:
        suffix = "" if group == results else f" ({group.relative_to(results)})"
        notebooks = {group / "comparison.ipynb": "", group / "pictures.ipynb": ""}
        notebooks |= {group / run / "evaluate.ipynb": f" ({run})" for run in shown}
        notebooks |= {p: f" ({p.stem.removeprefix('data-')})" for p in sorted(group.glob("data-*.ipynb"))}
        cells += [cell for path, name in notebooks.items() if path.is_file() for cell in read_part(path, name + suffix)]
    if not cells:
        raise ConfigError(f"{results} holds no executed notebook; expected comparison.ipynb, as `make study` writes it")
    beside = output.absolute().parent
    groups += sorted({path.parents[1] for path in results.glob("**/on-*/*/evaluate.status.json")} - set(groups))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # several notebooks share the page
        if page := cell.metadata.get("page"):
            cell.metadata["page"] = _address(page, beside)
    about = {
        "title": f"fmfa: finding a person from a sentence, {results.name}",
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "folder": in_project(results.absolute()),
        "parts": [(cell["id"], cell.metadata["question"]) for cell in cells if "question" in cell.metadata],
        "groups": [(group.name, list(_runs(group, beside))) for group in groups],
    }
    exporter = HTMLExporter(template_file=str(TEMPLATE), exclude_input=True, exclude_output_prompt=True,
                            exclude_anchor_links=True, embed_images=True)  # fmt: skip
    html, _ = exporter.from_notebook_node(new_notebook(cells=cells, metadata=about))
    with said_plainly(f"{output} cannot be written"), whole_file(output) as partial:
        partial.write_text(html, encoding="utf-8", errors="replace")  # names of files may be no text
    return output


def read_part(path: Path, suffix: str = "") -> list[NotebookNode]:
    """The cells that the page takes from an executed notebook, between one with its question and one with its command.

    Args:
        path: the notebook; its status record lies beside it.
        suffix: put behind the question.
    """
    record, failed = _executed(path)
    try:
        cells = nbformat.read(path, as_version=4).cells
    except Exception as error:  # nbformat lets JSON, schema and attribute errors through
        return [_box(question=path.stem + suffix, failed=failed or f"{path} cannot be read ({error})")]
    titles = (cell.source for cell in cells if cell.cell_type == "markdown" and cell.source.startswith("# "))
    question = re.sub(r"^# (\d+\.)?\s*", "", next(titles, f"# {path.stem}").splitlines()[0]) + suffix
    tagged = any(TAKEN in _tags(cell) for cell in cells)
    answer = [cell for cell in cells if ANSWER in _tags(cell)]
    taken = [cell for cell in cells if (TAKEN in _tags(cell) if tagged else ANSWER not in _tags(cell))]
    for cell in cells:
        cell.metadata["alt"] = f"Figure: {question}"
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^# .*\n?", "", cell.source)
        else:
            cell.outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    command = notebook_command(record) if {"notebook", "output", "given"} <= record.keys() else ""
    page = path.with_suffix(".html") if path.with_suffix(".html").is_file() else None
    return [_box(question=question, failed=failed), *answer, *_folded(taken), _box(command=command, page=page)]


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 written, 2 nothing to write."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.report", description="A results folder as one HTML page.")
    parser.add_argument("results", help="folder with executed notebooks, such as runs/quick")
    parser.add_argument("output", nargs="?", default="", help="the page; report.html in the folder without it")
    parser.add_argument("--shown", nargs="*", default=[], metavar="RUN", help="runs whose evaluation is shown")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.results, options.output, options.shown).absolute())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _executed(path: Path) -> tuple[dict[str, Any], str]:
    """The status record of an executed notebook, empty without one, and why the notebook did not end."""
    if not status_path(path).is_file():
        return {}, ""
    try:
        record = read_json(status_path(path))
    except ConfigError as error:
        return {}, str(error)
    if record.get("status") == "finished":
        return record, ""
    return record, str(record.get("error") or "it did not run to its end")


def _box(**content: Any) -> NotebookNode:
    return new_markdown_cell(metadata=content)


def _folded(cells: Sequence[NotebookNode]) -> list[NotebookNode]:
    """The cells with each section between two boxes, without those that show nothing; an error is content too."""
    sections: list[list[NotebookNode]] = [[]]
    for cell in cells:
        if cell.cell_type != "markdown":
            sections[-1].append(cell)
            continue
        for part in filter(None, re.split(r"^(?=## )", cell.source, flags=re.MULTILINE)):
            title, text = part.split("\n", 1) if part.startswith("## ") and "\n" in part else (part, part)
            if title.startswith("## "):
                sections.append([_box(fold=title.removeprefix("## "))])
            sections[-1] += [new_markdown_cell(text)] if not text.startswith("## ") else []
    folds = [[*section, _box(unfold=True)] for section in sections[1:] if _has_content(section)]
    return [cell for section in (sections[0], *folds) for cell in section]


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _has_content(section: Sequence[NotebookNode]) -> bool:
    code = [cell for cell in section if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    tables = any("<td" in output.get("data", {}).get("text/html", "") for output in outputs)
    return not code or tables or any(o.output_type == "error" or "image/png" in o.get("data", ()) for o in outputs)


def _runs(group: Path, beside: Path) -> Iterator[tuple[list[Any], list[tuple[str, str]]]]:
    """Cells of the table of runs, and the executed notebooks' names and addresses, of each run folder."""
    names = ("run.json", "train.status.json", "evaluate.status.json")
    for folder in sorted({path.parent for name in names for path in group.glob(f"*/{name}")}):
        record, pages = read_record(folder), []
        status, error = record.get("status", ""), record.get("error") or ""
        for step in ("train", "evaluate"):
            executed, failed = _executed(folder / f"{step}.ipynb")
            status = status or executed.get("status", "")
            if executed.get("status") == "failed":
                status, error = f"{step} failed", error or failed
            if (page := folder / f"{step}.html").is_file():
                pages.append((step, _address(page, beside)))
        best, device = record.get("best_epoch", ""), record.get("device", "")
        yield [folder.name, status or "no record", best, _minutes(record), device, error], pages


def _address(page: Path, beside: Path) -> str:
    """A page's address relative to a folder."""
    return quote(os.fsencode(os.path.relpath(page, beside)))


def _minutes(record: dict) -> str:
    times = [pd.to_datetime(str(record.get(name)), errors="coerce", utc=True) for name in ("started", "finished")]
    minutes = (times[1] - times[0]).total_seconds() / 60
    return "" if pd.isna(minutes) or record.get("resumed") else f"{minutes:.1f}"


if __name__ == "__main__":
    sys.exit(main())
