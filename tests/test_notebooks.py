"""The conventions that every notebook of the project keeps; one test a notebook."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from fmfa.errors import ConfigError
from fmfa.notebook import read_parameters

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MAX_CODE_LINES = 80
MAX_FUNCTION_LINES = 5
FORBIDDEN = {
    r"^\s*[!%].*\bpip\b": "installs with pip",
    r"^\s*!": "runs a shell command",
    r"\bsys\.path\b": "changes sys.path",
    r"^\s*%cd\b|\bos\.chdir\b": "changes the folder",
    r";\s*$": "ends a line with a semicolon",
}


def code_lines(source):
    return [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def tags(cell):
    return cell.metadata.get("tags", [])


def problems(notebook):
    """Everything in a notebook that the conventions forbid, as sentences."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [*_parameters(cells), *_code(cells), *_committed(cells, notebook.metadata)]


def _parameters(cells):
    tagged = [cell for cell in cells if "parameters" in tags(cell)]
    if len(tagged) != 1:
        yield f"{len(tagged)} cells are tagged 'parameters', expected one"
    for cell in tagged:
        try:
            if not read_parameters(cell.source).model_fields:
                yield "the parameters cell declares nothing"
        except ConfigError as error:
            yield f"parameters cell: {error}"


def _code(cells):
    lines = [line for cell in cells for line in code_lines(cell.source)]
    if len(lines) > MAX_CODE_LINES:
        yield f"{len(lines)} lines of code, at most {MAX_CODE_LINES}: move logic into the package"
    for line in lines:
        yield from (f"{reason}: {line.strip()!r}" for pattern, reason in FORBIDDEN.items() if re.search(pattern, line))
    for cell in cells:
        python = "\n".join("pass" if line[:1] in "%!" else line for line in cell.source.splitlines() if line)
        for node in ast.walk(ast.parse(python)):
            if isinstance(node, ast.ClassDef):
                yield f"defines the class {node.name}"
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    yield f"def {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def _committed(cells, metadata):
    full = [cell for cell in cells if cell.source.strip()]
    counted = [cell.execution_count is not None for cell in full]
    if not (all(counted) or (not any(counted) and not any(cell.outputs for cell in full))):
        yield "some cells have counts or outputs and some have none: strip all or execute all"
    for cell in full:
        if any(output.output_type == "error" for output in cell.outputs):
            yield f"holds the output of an error: {cell.source[:40]!r}"
        if "raises-exception" in tags(cell):
            yield "has the tag raises-exception"
        checked = "nbval-check-output" in tags(cell)
        if checked and not (cell.outputs and cell.execution_count is not None):
            yield f"asks nbval to compare output that it lacks: {cell.source[:40]!r}"
    if metadata.get("kernelspec", {}).get("name") != "python3":
        yield "has another kernel than python3"
    if "papermill" in metadata or any("injected-parameters" in tags(cell) for cell in cells):
        yield "is papermill's output, not the notebook itself"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_keeps_the_conventions(path):
    found = problems(nbformat.read(path, as_version=4))
    assert not found, "\n".join(found)


def good(executed=True):
    output = [new_output("stream", text="5\n")] if executed else []
    cells = [
        new_code_cell("epochs: int = 5  # passes", metadata={"tags": ["parameters"]}, execution_count=1),
        new_markdown_cell("Why: class X; !pip"),
        new_code_cell("print(epochs)\n\n# %cd in a comment", outputs=output, execution_count=2),
    ]
    if not executed:
        for cell in cells[::2]:
            cell.execution_count = None
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


@pytest.mark.parametrize("executed", [True, False])
def test_a_good_notebook_passes(executed):
    notebook = good(executed)
    if executed:
        notebook.cells[2].metadata["tags"] = ["nbval-check-output"]
    assert problems(notebook) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class A:\n    pass", "defines the class A"),
        ("def f(x):\n" + "    x += 1\n" * 5, "def f has 6 lines"),
        ("x = 1\n" * 80, "81 lines of code"),
        ("%pip install torch", "installs with pip"),
        ("!ls", "runs a shell command"),
        ("import sys\nsys.path.append('..')", "changes sys.path"),
        ("%cd ..", "changes the folder"),
        ("plt.plot(x);", "ends a line with a semicolon"),
    ],
)
def test_forbidden_code_is_found(source, message):
    notebook = good()
    notebook.cells[2].source = source
    assert any(problem.startswith(message) for problem in problems(notebook))


def test_forbidden_state_is_found():
    def broken(change):
        notebook = good()
        change(notebook)
        found = problems(notebook)
        assert len(found) == 1, found
        return found[0]

    assert "some cells have" in broken(lambda n: n.cells[0].update(execution_count=None))
    assert "0 cells are tagged" in broken(lambda n: n.cells[0].metadata.update(tags=[]))
    assert "not of the form" in broken(lambda n: n.cells[0].update(source="size: tuple = (1,)  # pixels"))
    assert "declares nothing" in broken(lambda n: n.cells[0].update(source="# later"))
    assert "raises-exception" in broken(lambda n: n.cells[2].metadata.update(tags=["raises-exception"]))
    asks = {"metadata": {"tags": ["nbval-check-output"]}, "outputs": []}
    assert "compare output that it lacks" in broken(lambda n: n.cells[2].update(nbformat.from_dict(asks)))
    error = new_output("error", ename="E", evalue="", traceback=[])
    assert "output of an error" in broken(lambda n: n.cells[2].update(outputs=[error]))
    assert "papermill's output" in broken(lambda n: n.metadata.update(papermill={}))
    assert "another kernel" in broken(lambda n: n.metadata.update(kernelspec={"name": "conda"}))
