"""One HTML page of a results folder: question, answer, figures, uncertainty and command, from the executed notebooks.

`python -m fmfa.report runs/quick --shown irra-0 fmfa-0`

A notebook's cells tagged `report` are taken (all of them if none is), without their code; the output of cells tagged
`answer` comes first. A section (`## ...`) whose code shows neither table nor figure is left out. The page needs no
server and loads nothing; everything that is not a notebook's own output is escaped.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pandas as pd
from jinja2 import Environment
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from fmfa.errors import ConfigError
from fmfa.files import read_json, said_plainly, whole_file
from fmfa.notebook import in_project, notebook_command, status_path
from fmfa.records import read_record

TAKEN, ANSWER = "report", "answer"
_PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width"><style>
body { font: 11pt/1.45 "DejaVu Sans", Verdana, sans-serif; color: #111; background: #fff; max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3, h4 { line-height: 1.2; page-break-after: avoid; }
h2 { border-top: 2px solid #111; padding-top: .6rem; margin-top: 3rem; }
a { color: #0b4f8a; }
img, svg { max-width: 100%; height: auto; page-break-inside: avoid; }
table { border-collapse: collapse; font-size: 9pt; margin: .8rem 0; display: block; overflow: auto; max-height: 40rem; }
th, td { border: 0; border-bottom: 1px solid #bbb; padding: .2rem .5rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 2px solid #111; }
pre, code { font: 9pt/1.35 "DejaVu Sans Mono", monospace; white-space: pre-wrap; }
.answer { border-left: 4px solid #0b4f8a; padding-left: 1rem; }
.answer pre { font: inherit; }
.command { background: #f2f2f2; padding: .5rem .8rem; }
.failed td { font-weight: bold; }
@media print { body { max-width: none; margin: 0; } table { max-height: none; } h2 ~ h2 { page-break-before: always; } }
</style></head><body>
<h1>{{ title }}</h1>
<p>Written {{ written }} from the executed notebooks of <code>{{ folder }}</code>. The command below each part runs it
again, in the project's folder.</p>
<ol>{% for part in sections %}<li><a href="#part-{{ loop.index }}">{{ part.question }}</a></li>{% endfor %}
<li><a href="#runs">Which runs are behind this?</a></li></ol>
{% for part in sections %}<h2 id="part-{{ loop.index }}">{{ part.question }}</h2>
{% if part.failed %}<p class="failed">This notebook failed: {{ part.failed }}</p>{% endif %}
{% if part.answer %}<div class="answer">{{ part.answer | safe }}</div>{% endif %}
{{ part.body | safe }}
{% if part.command %}<p class="command"><code>{{ part.command }}</code></p>{% endif %}
{% endfor %}
<h2 id="runs">Which runs are behind this?</h2>
<p>Every run of the folder, finished or not; minutes of training with its validation, unless it was interrupted.</p>
{% for name, runs in groups if runs %}<h3>{{ name }}</h3>
<table><thead><tr><th>run</th><th>status</th><th>best epoch</th><th>minutes</th><th>device</th><th>error</th>
<th>pages</th></tr></thead><tbody>
{% for cells, pages in runs %}<tr{% if cells[1] != "finished" %} class="failed"{% endif %}>
{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}
<td>{% for name, address in pages %}<a href="{{ address }}">{{ name }}</a> {% endfor %}</td></tr>
{% endfor %}</tbody></table>{% endfor %}</body></html>
"""


@dataclass(frozen=True)
class Section:
    """What the page takes from one executed notebook; `answer` and `body` are HTML."""

    question: str
    answer: str
    body: str
    command: str
    failed: str = ""  # why the notebook did not end


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
    sections = []
    for group in groups:
        suffix = "" if group == results else f" ({group.relative_to(results)})"
        notebooks = [group / "comparison.ipynb", group / "pictures.ipynb"]
        notebooks += [group / run / "evaluate.ipynb" for run in shown]
        for path in filter(Path.is_file, [*notebooks, *sorted(group.glob("data-*.ipynb"))]):
            names = {"evaluate": path.parent.name, "comparison": "", "pictures": ""}
            name = names.get(path.stem, path.stem.removeprefix("data-"))
            sections.append(read_section(path, f" ({name})" * bool(name) + suffix))
    if not sections:
        raise ConfigError(f"{results} holds no executed notebook; expected comparison.ipynb, as `make study` writes it")
    crossed = {path.parents[1] for path in results.glob("**/on-*/*/run.json")}
    groups += sorted(crossed - set(groups))
    page = (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            title=f"fmfa: finding a person from a sentence, {results.name}",
            written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            folder=in_project(results.absolute()),
            sections=sections,
            groups=[(group.name, list(_runs(group, output.absolute().parent))) for group in groups],
        )
    )
    with said_plainly(f"{output} cannot be written"), whole_file(output) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")  # names of files may be no text
    return output


def read_section(path: Path, suffix: str = "") -> Section:
    """Read one executed notebook as a section of the page.

    Args:
        path: the notebook; its status record lies beside it.
        suffix: put behind the question.
    """
    record, failed = _executed(path)
    try:
        cells = nbformat.read(path, as_version=4).cells
    except Exception as error:  # nbformat lets JSON, schema and attribute errors through
        return Section(path.stem + suffix, "", "", "", failed or f"{path} cannot be read ({error})")
    heading = next((c for c in cells if c.cell_type == "markdown" and c.source.startswith("# ")), None)
    question = heading.source.splitlines()[0].lstrip("# ") if heading else path.stem
    question = re.sub(r"^\d+\.\s*", "", question) + suffix
    tagged = any(TAKEN in _tags(cell) for cell in cells)
    taken = [cell for cell in cells if (TAKEN in _tags(cell) if tagged else ANSWER not in _tags(cell))]
    answer = [cell for cell in cells if ANSWER in _tags(cell)]
    command = notebook_command(record) if {"notebook", "output", "given"} <= record.keys() else ""
    return Section(question, _to_html(answer, question), _to_html(_with_content(taken), question), command, failed)


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
    error = record.get("error")
    told = f"{error.get('type')}: {error.get('message')}" if isinstance(error, dict) else "it did not run to its end"
    return record, told


def _tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def _with_content(cells: Sequence[NotebookNode]) -> list[NotebookNode]:
    """The cells without sections whose code shows neither table nor figure; an error is content too."""
    sections: list[list[NotebookNode]] = [[]]
    for cell in cells:
        if cell.cell_type != "markdown":
            sections[-1].append(cell)
            continue
        for part in filter(None, re.split(r"^(?=## )", cell.source, flags=re.MULTILINE)):
            if part.startswith("## "):
                sections.append([])
            sections[-1].append(nbformat.v4.new_markdown_cell(part))
    return [cell for number, section in enumerate(sections) if not number or _has_content(section) for cell in section]


def _has_content(section: Sequence[NotebookNode]) -> bool:
    code = [cell for cell in section if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    tables = any("<td" in output.get("data", {}).get("text/html", "") for output in outputs)
    return not code or tables or any(o.output_type == "error" or "image/png" in o.get("data", ()) for o in outputs)


def _to_html(cells: Sequence[NotebookNode], title: str) -> str:
    kept = []
    for cell in cells:
        cell = nbformat.from_dict(cell)
        cell.metadata["alt"] = f"Figure: {title}"
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"^#[^#].*\n?", "", cell.source)  # the question is the section's heading
            cell.source = re.sub(r"^(#+ )", r"#\1", cell.source, flags=re.MULTILINE)
        elif cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        kept.append(cell)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True, embed_images=True,
                            exclude_anchor_links=True)  # fmt: skip
    body, _ = exporter.from_notebook_node(nbformat.v4.new_notebook(cells=kept))
    body = re.sub(r'(<(?:h\d|div)\b[^>]*?) id="[^"]*"', r"\1", body)  # several notebooks share the page
    return body if body.strip() else ""


def _runs(group: Path, beside: Path) -> Iterator[tuple[list[Any], list[tuple[str, str]]]]:
    """Cells of the table of runs, and the executed notebooks' names and addresses, of each run folder."""
    names = ("run.json", "train.status.json")
    for folder in sorted({path.parent for name in names for path in group.glob(f"*/{name}")}):
        record, pages = read_record(folder), []
        status, error = record.get("status", "no record"), record.get("error") or ""
        for step in ("train", "evaluate"):
            executed, failed = _executed(folder / f"{step}.ipynb")
            if executed.get("status") == "failed":
                status, error = f"{step} failed", error or failed
            if (page := folder / f"{step}.html").is_file():
                pages.append((step, quote(os.fsencode(os.path.relpath(page, beside)))))
        best, device = record.get("best_epoch", ""), record.get("device", "")
        yield [folder.name, status, best, _minutes(record), device, error], pages


def _minutes(record: dict) -> str:
    times = [pd.to_datetime(str(record.get(name)), errors="coerce", utc=True) for name in ("started", "finished")]
    minutes = (times[1] - times[0]).total_seconds() / 60
    return "" if pd.isna(minutes) or record.get("resumed") else f"{minutes:.1f}"


if __name__ == "__main__":
    sys.exit(main())
