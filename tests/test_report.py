"""The report: what it takes from executed notebooks, and that the page stands alone."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fmfa.errors import ConfigError
from fmfa.report import ANSWER, TAKEN, main, read_part, write_report

ROOT = Path(__file__).parents[1]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects links and sources, and checks that elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.anchors = [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        self.anchors += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def parse(text):
    page = Page()
    page.feed(text)
    assert page.open == []
    return page


def executed(path, title, cells=(), status="finished", error=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=[new_markdown_cell(f"# {title}\n\nWhy."), *cells]), path)
    record = {"notebook": str(path), "output": str(path), "given": {"results": "/a b", "seed": 3}, "status": status}
    record["error"] = error
    path.with_suffix(".status.json").write_text(json.dumps(record))


def figure(tags=(), text="", source="plot_it()"):
    outputs = [new_output("display_data", {"image/png": PNG}), new_output("stream", name="stderr", text="a warning")]
    outputs += [new_output("stream", name="stdout", text=text)] if text else []
    return new_code_cell(source, outputs=outputs, metadata={"tags": list(tags)})


@pytest.mark.parametrize(("name", "tag"), [("01_data", TAKEN), ("04_evaluate", TAKEN), ("04_evaluate", ANSWER),
                                           ("05_ablation", ANSWER)])  # fmt: skip
def test_the_notebooks_say_what_the_report_takes(name, tag):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    assert any(tag in cell.metadata.get("tags", []) for cell in cells)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "runs" / "mine"
    cells = [
        figure(["report"]),
        new_markdown_cell("## Left out"),
        new_markdown_cell("## Taken <here>", metadata={"tags": ["report"]}),
        new_code_cell("say()", outputs=[new_output("stream", name="stdout", text="42 points")],
                      metadata={"tags": ["answer"]}),
    ]  # fmt: skip
    executed(folder / "comparison.ipynb", "4. Which system is better?", cells)
    executed(folder / "irra-0" / "evaluate.ipynb", "3. How often?", [figure(text="printed")])
    executed(folder / "on-other" / "comparison.ipynb", "4. Which system is better?", [figure()])
    (folder / "irra-0" / "run.json").write_text('{"status": "finished", "best_epoch": 4}')
    for page in ("irra-0/train.html", "on-other/comparison.html"):
        (folder / page).write_text("")
    executed(folder / "fmfa-0" / "train.ipynb", "2. How?", [], "failed", "OSError: disk <full>")
    return folder


def test_tagged_cells_are_taken_without_code_and_answers_stand_in_front(results):
    first, answer, *body, last = read_part(results / "comparison.ipynb")
    assert first.metadata.question == "Which system is better?"
    assert answer.outputs[0].text == "42 points"
    assert [cell.metadata.get("fold") for cell in body] == [None, "Taken <here>", None]
    assert body[-1].metadata.unfold
    assert [output.output_type for output in body[0].outputs] == ["display_data"]  # no warning
    assert last.metadata.command.endswith("-p results '/a b' -p seed 3")
    text = write_report(results).read_text()
    assert text.count("plot_it") == 0
    assert text.count("data:image/png;base64,") == 2


def test_a_notebook_without_tags_is_taken_whole(results):
    _, words, code, _ = read_part(results / "irra-0" / "evaluate.ipynb")
    assert words.source.strip() == "Why."
    assert code.outputs[-1].text == "printed"


def test_the_page_stands_alone_and_lists_every_run(results):
    path = write_report(results, shown=["irra-0", "not-there-0"])
    assert path == results / "report.html"
    text = path.read_text()
    page = parse(text)
    links = {address for address in page.addresses if not address.startswith(("data:", "#"))}
    assert links == {"irra-0/train.html", "on-other/comparison.html"}
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.anchors)
    assert len(page.anchors) == len(set(page.anchors))
    assert not re.search(r"https?://|<script|@import", text)
    assert "How often? (irra-0)" in text
    assert "Which system is better? (on-other)" in text
    assert text.index("Which system is better?") < text.index("42 points") < text.index("<summary>Taken &lt;here&gt;")
    assert "disk &lt;full&gt;" in text
    assert "train failed" in text
    assert "Figure: How often? (irra-0)" in text


def test_a_failed_notebook_says_so(results):
    executed(results / "comparison.ipynb", "4. Which?", [], "failed", "ConfigError: no <run>")
    assert "This notebook failed: ConfigError: no &lt;run&gt;" in write_report(results).read_text()


def test_an_empty_folder_is_an_error(tmp_path, capsys):
    with pytest.raises(ConfigError, match="holds no executed notebook"):
        write_report(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "holds no executed notebook" in capsys.readouterr().err


# --- sections without content


def section(number, *outputs):
    """A heading at the end of the text before it, and a cell with outputs."""
    text = f"What the last one showed.\n\n## Section {number}\n\nWhy {number}."
    return [new_markdown_cell(text), new_code_cell("code()", outputs=list(outputs))]


def test_sections_that_show_nothing_vanish(tmp_path):
    shown = {
        1: new_output("display_data", {"image/png": PNG}),
        2: new_output("display_data", {"text/html": pd.DataFrame(columns=["row"]).to_html(), "text/plain": "Empty"}),
        3: new_output("display_data", {"text/html": pd.DataFrame({"row": [1]}).to_html(), "text/plain": "x"}),
        5: new_output("error", ename="ConfigError", evalue="why", traceback=["ConfigError: why"]),
    }
    printed = new_output("stream", name="stdout", text="No run has this.")
    cells = [cell for number in range(7) for cell in section(number, *filter(None, [shown.get(number), printed]))]
    executed(tmp_path / "comparison.ipynb", "4. Which?", [*cells, new_markdown_cell("## Text alone")])
    body = write_report(tmp_path).read_text()
    assert re.findall(r"Section (\d)", body) == ["1", "3", "5"]
    assert re.findall(r"Why (\d)", body) == ["1", "3", "5"]
    assert body.count("What the last one showed") == 4  # of the introduction, and of those three
    assert body.count("No run has this") == 3
    assert "Text alone" in body
    assert "ConfigError: why" in body


# --- what is damaged or hostile


@pytest.mark.parametrize("content", ["", "{", "null", "[]", '{"cells": 3}', '{"nbformat": 4}', "\x00"])
def test_a_damaged_notebook_or_record_is_told_on_the_page(results, content):
    for name in ("comparison.status.json", "irra-0/run.json", "irra-0/train.status.json"):
        (results / name).write_text(content)
    (results / "pictures.ipynb").write_text(content)
    text = write_report(results, shown=["irra-0"]).read_text()
    parse(text)
    assert "pictures.ipynb cannot be read" in text
    assert "How often? (irra-0)" in text


def test_a_notebook_that_was_killed_is_no_finished_one(results):
    executed(results / "comparison.ipynb", "4. Which?", [figure()], "running")
    assert "This notebook failed: it did not run to its end" in write_report(results).read_text()


HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", '"><b onclick="x', "' onmouseover='x", "a b&amp;c",
    "javascript:alert(1)", "100%#fragment?query", "{{ 7 * 7 }}{% raw %}", "\\1 \\g<0> back", "$HOME `id` $(id)", "走路",
    "two\nlines", os.fsdecode(b"no text \xff"),
]  # fmt: skip


class Tags(HTMLParser):
    """Every tag with the names of its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, [name for name, _ in attrs]))


def test_names_of_folders_rows_and_data_sets_are_text(tmp_path):
    def page(name):
        name = name.replace("/", "")
        folder, word = tmp_path / name, name.encode(errors="replace").decode()
        table = pd.DataFrame({word: [word]}, index=pd.Index([word], name=word))
        shown = new_output("display_data", {"text/html": table.to_html(), "text/plain": str(table)})
        printed = new_output("stream", name="stdout", text=word)
        cells = [new_code_cell("code()", outputs=[printed, shown]), figure(["answer"])]
        executed(folder / "comparison.ipynb", "4. Which?", cells)
        executed(folder / f"data-{name}.ipynb", "1. What?", [figure()])
        executed(folder / name / "comparison.ipynb", "4. Which?", cells)
        for run in (folder / f"{name}-0", folder / "on-x" / f"{name}-0"):
            executed(run / "evaluate.ipynb", "3. How?", [figure()], "failed", word)
            (run / "train.html").write_text("found")
            (run / "run.json").write_text(json.dumps(dict.fromkeys(("status", "device", "best_epoch"), name)))
        return write_report(folder, shown=[f"{name}-0"]).read_text()

    plain = Tags(page("plain")).found
    for name in HOSTILE:
        text = page(name)
        parse(text)
        assert Tags(text).found == plain, name
        addresses = {address for address in parse(text).addresses if not address.startswith(("#", "data:"))}
        assert addresses
        for address in addresses:
            there = tmp_path / name.replace("/", "") / os.fsdecode(unquote_to_bytes(address))
            assert urlsplit(address)[:2] == ("", "")
            assert urlsplit(address)[3:] == ("", "")
            assert there.read_text() == "found"
