import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from papermill.exceptions import PapermillExecutionError

from fmfa.errors import ConfigError
from fmfa.files import PROJECT
from fmfa.notebook import (
    KINDS,
    check_parameters,
    declare_parameters,
    main,
    notebook_parameters,
    read_parameters,
    resolve_parameters,
    run_notebook,
    status_path,
)
from fmfa.progress import progress_bar
from fmfa.training.config import TrainConfig

CELL = """\
# How long and how fast.
epochs: int = 5  # passes over the training pairs
learning_rate: float = 3e-4  # base rate
tensorboard: bool = True  # write TensorBoard logs
method: str = "a=b # c"  # what to train
seeds: list = [
    0,
    1,
]  # one run each
"""


@pytest.fixture
def write(tmp_path):
    def write(*sources: str, tags=("parameters",), name="in {put}.ipynb") -> Path:
        cells = [new_code_cell(source) for source in sources]
        cells[0].metadata["tags"] = list(tags)
        path = tmp_path / "note books" / name
        path.parent.mkdir(exist_ok=True)
        nbformat.write(new_notebook(cells=cells), path)
        return path

    return write


def outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def test_the_parameters_cell_is_read():
    fields = read_parameters(CELL).model_fields
    assert list(fields) == ["epochs", "learning_rate", "tensorboard", "method", "seeds"]
    assert (fields["epochs"].default, fields["epochs"].description) == (5, "passes over the training pairs")
    assert (fields["method"].default, fields["method"].description) == ("a=b # c", "what to train")
    assert (fields["seeds"].default, fields["seeds"].description) == ([0, 1], "one run each")
    assert read_parameters("rate: float = -1.0  # negative literals, too")().rate == -1.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("epochs = 5  # untyped", "not of the form"),
        ("import os", "not of the form"),
        ("epochs: int  # no default", "not of the form"),
        ("size: tuple = (1, 2)  # pixels", "not of the form"),
        ("folder: str | None = None  # optional", "not of the form"),
        ("epochs: int = 2 * 3  # six", "not of the form"),
        ("rate: float = 1  # an int", "not of the form"),
        ("flag: int = True  # a bool", "not of the form"),
        ("epochs: int = 5", "not of the form"),
        ("epochs: int = 5  # first\nepochs: int = 6  # again", "declared twice"),
        ("epochs: int = = 5  # typo", "not valid Python"),
    ],
)
def test_a_line_of_another_form_is_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        read_parameters(source)


@pytest.mark.parametrize(
    ("kind", "default", "value", "expected"),
    [
        (float, 1.0, "1e-5", 1e-5),
        (float, 1.0, 2, 2.0),
        (float, 1.0, "2", 2.0),
        (int, 1, "-3", -3),
        (bool, True, "false", False),
        (bool, False, "True", True),
        (str, "", "1e-5", "1e-5"),
        (list, [], "[1, a]", [1, "a"]),
    ],
)
def test_values_become_the_declared_type(kind, default, value, expected):
    converted = resolve_parameters(declare_parameters({"name": (default, "help")}), {"name": value})["name"]
    assert converted == expected
    assert type(converted) is kind


@pytest.mark.parametrize(
    ("kind", "default", "value"),
    [
        (int, 1, 2.0),
        (int, 1, "2.0"),
        (int, 1, True),
        (int, 1, None),
        (float, 1.0, 10**400),
        (float, 1.0, "nan"),
        (float, 1.0, float("inf")),
        (float, 1.0, False),
        (float, 1.0, "fast"),
        (bool, True, 1),
        (bool, True, "1"),
        (bool, True, "yes"),
        (str, "", 5),
        (list, [], "a"),
        (list, [], "[1"),
        (list, [], (1, 2)),
    ],
)
def test_values_of_another_type_are_refused(kind, default, value):
    with pytest.raises(ConfigError, match=r"name: should be a .*\(what it does\)"):
        resolve_parameters(declare_parameters({"name": (default, "what it does")}), {"name": value})


def test_bytes_that_are_not_utf8_are_refused():
    text = b"caf\xe9".decode(errors="surrogateescape")
    for name in ("name", "root"):
        declared = declare_parameters({name: ("", "what it does")})
        with pytest.raises(ConfigError, match=rf"{name}: should be valid Unicode, found 'caf\\udce9' \(what it does\)"):
            resolve_parameters(declared, {name: text})


def test_unknown_names_are_refused_with_the_valid_ones():
    declared = read_parameters(CELL)
    assert resolve_parameters(declared, {"epochs": "9"})["epochs"] == 9
    with pytest.raises(ConfigError, match=r"'epoch'; did you mean epochs\? valid are epochs, learning_rate"):
        resolve_parameters(declared, {"epoch": 9})


def test_a_notebook_declares_at_most_once(write, tmp_path):
    path = write(CELL)
    assert next(iter(notebook_parameters(path).model_fields)) == "epochs"
    assert not notebook_parameters(write("print(1)", tags=())).model_fields
    notebook = nbformat.read(write(CELL), as_version=4)
    notebook.cells.append(new_code_cell(CELL, metadata={"tags": ["parameters"]}))
    nbformat.write(notebook, path)
    with pytest.raises(ConfigError, match="2 cells tagged"):
        notebook_parameters(path)
    with pytest.raises(ConfigError, match="no such notebook"):
        notebook_parameters(tmp_path / "none.ipynb")
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="not a readable notebook"):
        notebook_parameters(path)


def namespace(source, **changes):
    values: dict = {}
    exec(source, values)
    return values | {"In": ["", "import os", source, "chosen = check_parameters(...)"]} | changes


def test_the_values_of_the_cell_are_checked_again():
    source = 'folder: str = "x"  # a\nrate: float = 0.1  # b\n'
    assert check_parameters(namespace(source)).model_dump() == {"folder": os.path.abspath("x"), "rate": 0.1}
    assert check_parameters(namespace(source, rate=2)).rate == 2.0
    with pytest.raises(ConfigError, match=r"rate: should be a valid number, found 'fast' \(b\)"):
        check_parameters(namespace(source, rate="fast"))
    with pytest.raises(ConfigError, match="run it first"):
        check_parameters({"In": ["", "x = 1"]})


@pytest.mark.parametrize(
    ("name", "value"),
    [("split", "tst"), ("phrases", -1), ("queries", 21), ("seed", -1), ("scale", "tinny"), ("pair", 24),
     ("results", "nowhere"), ("away", ["nowhere"])],
)  # fmt: skip
def test_parameters_out_of_their_limits_are_refused(name, value):
    good = 'split: str = "test"  # a\nrun: str = "x"  # b\nphrases: int = 0  # c\nvocabulary: str = ""  # d\n'
    chosen = check_parameters(namespace(good))
    assert (chosen.split, chosen.run, chosen.phrases) == ("test", os.path.abspath("x"), 0)
    with pytest.raises(ConfigError, match=rf"{name}.*: .*found"):
        resolve_parameters(declare_parameters({name: (type(value)(), "help")}), {name: value})


def test_every_field_of_the_training_configuration_fits_into_a_cell():
    values = TrainConfig().to_dict()
    source = "".join(f"{key}: {type(value).__name__} = {value!r}  # h\n" for key, value in values.items())
    assert TrainConfig.from_dict(check_parameters(namespace(source)).model_dump()) == TrainConfig()


def test_a_run_leaves_notebook_page_and_record(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "0")
    notebook = write(
        CELL,
        "from fmfa.training.config import TrainConfig\nfrom fmfa.notebook import check_parameters\n"
        "config = TrainConfig.from_dict(check_parameters(globals()).model_dump(exclude={'seeds', 'method'}))",
        "from fmfa.progress import progress_bar\nwith progress_bar(1, 'bar', 'things') as bar: bar.update()",
        "import os\nprint(os.path.basename(os.getcwd()), config.learning_rate, epochs, seeds, tensorboard)",
    )
    before = notebook.read_bytes()
    given = {"learning_rate": "1e-5", "seeds": "[4]", "tensorboard": False}
    Path("given.yml").write_text(yaml.safe_dump(given))
    assert main([str(notebook), "runs/{1}/out.ipynb", "-f", "given.yml"]) == 0
    output = tmp_path / "runs/{1}/out.ipynb"
    record = json.loads(status_path(output).read_text())
    assert capsys.readouterr().out == f"{output.with_suffix('.html')}\n"
    assert "note books 1e-05 5 [4] False" in outputs(output)
    assert "note books 1e-05 5 [4] False" in output.with_suffix(".html").read_text()
    cells = nbformat.read(output, as_version=4).cells
    assert [len(cell.outputs) for cell in cells] == [0, 0, 0, 0, 1]
    assert (record["status"], record["error"]) == ("finished", None)
    assert record["given"] == given
    resolved = {"epochs": 5, "learning_rate": 1e-5, "tensorboard": False, "method": "a=b # c", "seeds": [4]}
    assert record["parameters"] == resolved
    assert record["started"] < record["finished"]
    assert notebook.read_bytes() == before
    assert Path.cwd() == tmp_path


def test_paths_start_where_the_user_stands(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("mine.pt", "json"):
        Path(name).write_text("")
    notebook = write(
        'root: str = ""  # a\nruns: list = []  # b\nweights: str = ""  # c\n'
        'results: str = "../x"  # d\nmethod: str = ""  # e',
        "print([root, *runs, weights, results, method])",
    )
    given = {"root": "my data/set", "runs": ["~/a", "/b/../c"], "weights": "mine.pt", "method": "json"}
    run_notebook(notebook, tmp_path / "out.ipynb", given, html=False)
    here = tmp_path / "here"
    found = [f"{here}/my data/set", "/home/me/a", "/c", f"{here}/mine.pt", "../x", "json"]
    assert outputs(tmp_path / "out.ipynb") == f"{found}\n"


@pytest.mark.parametrize("name", ["weights", "text_weights", "backbone", "vocabulary"])
def test_names_that_are_no_files_stay_names(tmp_path, monkeypatch, name):
    def given(value):
        return resolve_parameters(declare_parameters({name: ("", "help")}), {name: value})[name]

    monkeypatch.chdir(tmp_path)
    for value in ("", "none", "openai", "ViT-B-16-quickgelu", "google-bert/bert-base-uncased"):
        assert given(value) == value
    (tmp_path / "openai").mkdir()
    assert given("openai") == "openai"
    assert given("~/there") == str(Path.home() / "there")
    assert given("data/tiny_clip_config.json") == "data/tiny_clip_config.json"  # of the project, from anywhere
    monkeypatch.chdir(PROJECT)
    assert given("data/tiny_clip_config.json") == "data/tiny_clip_config.json"
    monkeypatch.chdir(PROJECT / "data")
    assert given("tiny_clip_config.json") == str(PROJECT / "data" / "tiny_clip_config.json")


def test_every_parameter_that_may_be_a_path_starts_where_the_user_stands():
    fields = [notebook_parameters(path).model_fields for path in sorted((PROJECT / "notebooks").glob("*.ipynb"))]
    declared = {name: field for each in fields for name, field in each.items()}
    paths = {
        name
        for name, field in declared.items()
        if isinstance(field.default, str | list) and re.search(r"\b(folders?|files?)\b", field.description)
    }
    assert paths - {"position_grid"} <= KINDS.keys()  # which speaks of a file, and is none


def test_a_failing_cell_keeps_the_notebook_and_says_so(write, tmp_path, capsys):
    notebook = write(CELL, "print('reached', epochs)", "raise OSError('disk <full>')", "print('never')")
    parameters = tmp_path / "parameters.yml"
    parameters.write_text("epochs: 7\nlearning_rate: 1e-5\n")
    output = tmp_path / "out.ipynb"
    status = main([str(notebook), str(output), "-f", str(parameters), "-p", "epochs", "8"])
    assert status == 1
    assert "disk <full>" in capsys.readouterr().err
    text = outputs(output)
    assert "reached 8" in text
    assert "never" not in text
    record = json.loads(status_path(output).read_text())
    assert record["status"] == "failed"
    assert record["error"] == "OSError: disk <full>"
    assert record["parameters"]["learning_rate"] == 1e-5
    assert "disk &lt;full&gt;" in output.with_suffix(".html").read_text()


def test_bad_parameters_change_nothing(write, tmp_path, capsys):
    notebook, output = write(CELL), tmp_path / "runs" / "out.ipynb"
    for given in (["-p", "epoch", "8"], ["-p", "epochs", "many"], ["-f", str(tmp_path / "none.yml")]):
        assert main([str(notebook), str(output), *given]) == 2
        assert not output.parent.exists()
    assert "did you mean epochs?" in capsys.readouterr().err
    output.parent.mkdir()
    earlier = {path: path.name for path in (output, output.with_suffix(".html"), status_path(output))}
    for path, text in earlier.items():
        path.write_text(text)
    assert main([str(notebook), str(output), "-p", "epoch", "8"]) == 2
    assert {path: path.read_text() for path in output.parent.iterdir()} == earlier
    with pytest.raises(ConfigError, match="other than the notebook itself"):
        run_notebook(notebook, notebook)


def test_an_output_that_cannot_be_written_is_one_sentence(write, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([str(write(CELL)), str(tmp_path / "file" / "out.ipynb")]) == 2
    (tmp_path / "out.ipynb").mkdir()
    assert main([str(write(CELL)), str(tmp_path / "out.ipynb")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" cannot be written: ")[0] for line in lines] == [
        f"error: {tmp_path / 'file' / 'out.ipynb'}",
        f"error: {tmp_path / 'out.ipynb'}",
    ]


def test_an_error_for_users_is_told_without_a_traceback(write, tmp_path, capsys):
    notebook = write(CELL, "from fmfa.errors import TrainingError\nraise TrainingError('the disk is full; make room')")
    output = tmp_path / "out.ipynb"
    assert main([str(notebook), str(output)]) == 1
    assert capsys.readouterr().err == f"error: the disk is full; make room\nrecord: {status_path(output)}\n"
    assert json.loads(status_path(output).read_text())["error"] == "TrainingError: the disk is full; make room"


def test_parameters_are_listed(write, capsys):
    assert main([str(write(CELL)), "--help-parameters"]) == 0
    listed = capsys.readouterr().out
    assert "learning_rate: float = 0.0003  # base rate\n" in listed
    assert "A relative path that you give starts where you are" in listed


def _broken_kernel(folder: Path, monkeypatch, failures: int) -> None:
    """A `python3` kernel that exits at its first `failures` starts, found before the real one."""
    counter = folder / "starts"
    script = (
        f"import sys, pathlib; p = pathlib.Path({str(counter)!r});"
        "n = len(p.read_text()) if p.exists() else 0; p.write_text('x' * (n + 1));"
        f"n < {failures} and sys.exit(3);"
        "from ipykernel.kernelapp import launch_new_instance as go; sys.argv[:1] = ['k']; go()"
    )
    spec = {"argv": [sys.executable, "-c", script, "-f", "{connection_file}"], "display_name": "Python 3"}
    kernel = folder / "jupyter/kernels/python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec | {"language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))


@pytest.mark.parametrize(("failures", "status"), [(1, "finished"), (9, "failed")])
def test_a_kernel_that_does_not_start_is_tried_once_more(write, tmp_path, monkeypatch, failures, status):
    _broken_kernel(tmp_path, monkeypatch, failures)
    notebook, output = write("print('ran')", tags=()), tmp_path / "out.ipynb"
    if status == "finished":
        run_notebook(notebook, output, html=False)
        assert "ran" in outputs(output)
    else:
        with pytest.raises(RuntimeError, match=r"[Kk]ernel"):
            run_notebook(notebook, output, html=False)
    assert json.loads(status_path(output).read_text())["status"] == status
    assert (tmp_path / "starts").read_text() == "xx"


def test_a_kernel_that_dies_in_a_cell_is_not_tried_again(write, tmp_path, monkeypatch):
    _broken_kernel(tmp_path, monkeypatch, 0)
    notebook = write("import os\nos._exit(1)", tags=())
    with pytest.raises((RuntimeError, PapermillExecutionError)):
        run_notebook(notebook, tmp_path / "out.ipynb", html=False)
    assert json.loads(status_path(tmp_path / "out.ipynb").read_text())["status"] == "failed"
    assert (tmp_path / "starts").read_text() == "x"


@pytest.mark.parametrize(("variable", "shown", "silent"), [("1", True, True), ("0", True, False), (None, False, True)])
def test_progress_bars_obey_the_environment_and_the_caller(monkeypatch, capsys, variable, shown, silent):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if variable is not None:
        monkeypatch.setenv("TQDM_DISABLE", variable)
    with progress_bar(3, "encoding", "things", shown=shown) as bar:
        bar.update(3)
    assert ("encoding" not in capsys.readouterr().err) == silent


def test_a_notebook_in_place_has_one_normal_form(tmp_path, capsys):
    """Executed twice, its bytes are the same: no times, warnings, random ids or paths of this machine."""
    source = (
        "import sys\nimport pandas as pd\nfrom fmfa.files import PROJECT\nprint(size, PROJECT / 'data')\n"
        "print('warning', file=sys.stderr)\npd.DataFrame({'a': [1]}).style"
    )
    cells = [new_code_cell("size: int = 3  # of it", metadata={"tags": ["parameters"]}), new_code_cell(source)]
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    path = tmp_path / "one.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=about), path)
    assert main([str(path), "--in-place"]) == 0
    first = path.read_bytes()
    assert main([str(path), "--in-place"]) == 0
    assert path.read_bytes() == first
    outputs = nbformat.read(path, as_version=4).cells[1].outputs
    assert [output.output_type for output in outputs] == ["stream", "execute_result"]
    assert outputs[0].text == "3 data\n"
    assert "T_00000" in outputs[1].data["text/html"]


@pytest.mark.parametrize("words", [["out.ipynb"], ["-p", "seed", "1"], ["-f", "values.yml"]])
def test_a_notebook_in_place_takes_nothing_else(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["notebooks/01_data.ipynb", *words, "--in-place"])
    assert "neither an output nor parameters" in capsys.readouterr().err


def test_a_notebook_in_place_that_fails_is_left_as_it_was(tmp_path, capsys):
    path = tmp_path / "one.ipynb"
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}}
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")], metadata=about), path)
    before = path.read_bytes()
    assert main([str(path), "--in-place"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert path.read_bytes() == before
