"""One HTML page of a results folder: question, answer, figures, uncertainty and command, from the executed notebooks.

`python -m fmfa.report runs/quick --shown irra-0 fmfa-0`

A notebook's cells tagged `report` are taken (all of them where none is), without their code; the output of cells tagged
`answer` stands in front. The page needs no server and loads nothing.
"""

import argparse
import html
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from fmfa.errors import ConfigError
from fmfa.files import whole_file
from fmfa.records import read_record
from fmfa.runner import status_path

PROJECT = Path(__file__).parents[1]
TAKEN, ANSWER = "report", "answer"
_STYLE = """
body { font: 11pt/1.45 "DejaVu Sans", Verdana, sans-serif; color: #111; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3, h4 { line-height: 1.2; page-break-after: avoid; }
h2 { border-top: 2px solid #111; padding-top: .6rem; margin-top: 3rem; }
a { color: #0b4f8a; }
img, svg { max-width: 100%; height: auto; page-break-inside: avoid; }
table { border-collapse: collapse; font-size: 9pt; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { border: 0; border-bottom: 1px solid #bbb; padding: .2rem .5rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #111; }
pre, code { font: 9pt/1.35 "DejaVu Sans Mono", monospace; white-space: pre-wrap; }
.answer { border-left: 4px solid #0b4f8a; padding-left: 1rem; }
.command { background: #f2f2f2; padding: .5rem .8rem; }
.failed td { font-weight: bold; }
@media print { body { max-width: none; margin: 0; } h2 { page-break-before: always; } }
"""


@dataclass(frozen=True)
class Section:
    """What the page takes from one executed notebook."""

    anchor: str
    question: str
    body: str
    command: str
    failed: str = ""  # the error, where the notebook did not end
    answers: list[str] = field(default_factory=list)  # HTML


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
        ConfigError: no executed notebook in the folder.
    """
    results, output = Path(results), Path(output or Path(results) / "report.html")
    groups = [results, *sorted({path.parent for path in results.glob("*/**/comparison.ipynb")} - {results})]
    sections = []
    for group in groups:
        suffix = "" if group == results else f" ({group.relative_to(results)})"
        notebooks = [group / "comparison.ipynb", group / "pictures.ipynb"]
        notebooks += [group / run / "evaluate.ipynb" for run in shown]
        for path in filter(Path.is_file, [*notebooks, *sorted(group.glob("data-*.ipynb"))]):
            names = {"evaluate": path.parent.name, "comparison": "", "pictures": ""}
            name = names.get(path.stem, path.stem.removeprefix("data-"))
            name = f" ({name})" if name else ""
            sections.append(read_section(path, len(sections), name + suffix))
    if not sections:
        raise ConfigError(f"{results} holds no executed notebook; expected comparison.ipynb, as `make study` writes it")
    crossed = {path.parents[1] for path in results.glob("**/on-*/*/run.json")}
    tables = "".join(_runs(group, output.absolute().parent) for group in [*groups, *sorted(crossed - set(groups))])
    _write(output, _page(results, sections, tables))
    return output


def read_section(path: Path, number: int = 0, suffix: str = "") -> Section:
    """Read one executed notebook as a section of the page.

    Args:
        path: the notebook; its status record lies beside it.
        number: of the section, for its anchor.
        suffix: put behind the question.
    """
    notebook = nbformat.read(path, as_version=4)
    heading = next((c for c in notebook.cells if c.cell_type == "markdown" and c.source.startswith("# ")), None)
    question = heading.source.splitlines()[0].lstrip("# ") if heading else path.stem
    question = re.sub(r"^\d+\.\s*", "", question) + suffix
    tagged = any(TAKEN in _tags(cell) for cell in notebook.cells)
    taken = [cell for cell in notebook.cells if (TAKEN in _tags(cell) if tagged else ANSWER not in _tags(cell))]
    answers = [_to_html([cell], question) for cell in notebook.cells if ANSWER in _tags(cell)]
    record = json.loads(status_path(path).read_text(encoding="utf-8")) if status_path(path).is_file() else {}
    error = record.get("error") or {}
    failed = f"{error.get('type')}: {error.get('message')}" if record.get("status") == "failed" else ""
    body = _to_html(taken, question)
    return Section(f"part-{number}", question, body, _command(path, record), failed, [a for a in answers if a.strip()])


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


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _to_html(cells: list[NotebookNode], title: str) -> str:
    kept = []
    for cell in cells:
        cell = nbformat.from_dict(cell)
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^#[^#].*\n?", "", cell.source)  # the question is the section's heading
            cell.source = re.sub(r"^(#+ )", r"#\1", cell.source, flags=re.MULTILINE)
        elif cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        kept.append(cell)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True, embed_images=True)
    exporter.log.setLevel("ERROR")  # not one warning a figure about the text that is put in below
    body, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=kept))
    body = re.sub(r'<a class="anchor-link".*?</a>', "", body)
    body = re.sub(r'(<(?:h\d|div)\b[^>]*?) id="[^"]*"', r"\1", body)  # several notebooks stand on one page
    return re.sub(r'alt="No description[^"]*"', f'alt="Figure: {html.escape(title, quote=True)}"', body)


def _command(path: Path, record: dict) -> str:
    if not record:
        return ""
    given = [word for name, value in record["given"].items() for word in ("-p", name, _relative(value))]
    return shlex.join(["python", "-m", "fmfa.runner", _relative(record["notebook"]), _relative(path), *given])


def _relative(value: object) -> str:
    text = str(value)
    inside = os.path.isabs(text) and Path(text).is_relative_to(PROJECT)
    return f"$PWD/{Path(text).relative_to(PROJECT)}" if inside else text


def _runs(group: Path, beside: Path) -> str:
    folders = sorted({path.parent for name in ("run.json", "train.status.json") for path in group.glob(f"*/{name}")})
    if not folders:
        return ""
    rows = []
    for folder in folders:
        record, links = read_record(folder), []
        status, error = record.get("status", "no record"), record.get("error") or ""
        for step in ("train", "evaluate"):
            path = folder / f"{step}.status.json"
            executed = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if executed.get("status") == "failed":
                status, error = f"{step} failed", error or executed["error"]["message"]
            if (page := folder / f"{step}.html").is_file():
                links.append(f'<a href="{os.path.relpath(page, beside)}">{step}</a>')
        cells = [folder.name, status, record.get("best_epoch", ""), _minutes(record), record.get("device", ""), error]
        mark = "" if status == "finished" else ' class="failed"'
        row = "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells)
        rows.append(f"<tr{mark}>{row}<td>{' '.join(links)}</td></tr>")
    names = ("run", "status", "best epoch", "minutes", "device", "error", "pages")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<h3>{group.name}</h3><table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _minutes(record: dict) -> str:
    if not (record.get("started") and record.get("finished")) or record.get("resumed"):
        return ""
    return f"{(pd.Timestamp(record['finished']) - pd.Timestamp(record['started'])).total_seconds() / 60:.1f}"


def _page(results: Path, sections: list[Section], tables: str) -> str:
    contents, parts = [], []
    for section in sections:
        question, answers = html.escape(section.question), "".join(section.answers)
        contents.append(f'<li><a href="#{section.anchor}">{question}</a></li>')
        answer = f'<div class="answer">{answers}</div>' if answers else ""
        failed = f'<p class="failed">This notebook failed: {html.escape(section.failed)}</p>' if section.failed else ""
        command = f'<p class="command"><code>{html.escape(section.command)}</code></p>' if section.command else ""
        parts.append(f'<h2 id="{section.anchor}">{question}</h2>{failed}{answer}{section.body}{command}')
    title = f"fmfa: finding a person from a sentence, {html.escape(results.name)}"
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1><p>Written {written} from the executed notebooks of <code>{html.escape(str(results))}</code>."
        f' Everything again: <code>make study SCALE={html.escape(results.name)}</code>.</p><div class="contents">'
        f'<ol>{"".join(contents)}<li><a href="#runs">Which runs stand behind this?</a></li></ol></div>{"".join(parts)}'
        '<h2 id="runs">Which runs stand behind this?</h2><p>Every run of the folder, finished or not; minutes of '
        f"training with its validation, where it was not interrupted.</p>{tables}</body></html>\n"
    )


def _write(output: Path, page: str) -> None:
    with whole_file(output) as partial:
        partial.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
