"""Commands that the report and the notebooks print work when they are pasted into a shell in the project's folder."""

import html
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from fmfa import notebook as arguments
from fmfa.notebook import in_project, notebook_command, notebook_parameters, resolve_parameters
from fmfa.study.definition import read_study
from fmfa.study.levels import run_results
from fmfa.study.results import METRICS, read_results

ROOT = Path(__file__).parents[1]
NAMES = [
    "plain",
    "two words",
    "it's",
    '"quoted"',
    "$HOME `id` $(id)",
    "{a} [b] *",
    "#1; & | <x>",
    "-p",
    "走路",
    "~",
    "!x\\",
]


def shell_words(command, folder):
    """The words that a program gets when a command is pasted into a shell in a folder."""
    spell = "import sys; sys.stdout.buffer.write(b'\\0'.join(map(__import__('os').fsencode, sys.argv[1:])))"
    functions = f'python() {{ {shlex.quote(sys.executable)} -c {shlex.quote(spell)} python "$@"; }}\n'
    done = subprocess.run(["bash", "-c", functions + command], cwd=folder, capture_output=True, check=True)
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")]


def given_in(words):
    """Notebook, output and parameters of a command's words, as the runner reads them."""
    assert words[:3] == ["python", "-m", "fmfa.notebook"]
    pairs = words[5:]
    assert pairs[::3] == ["-p"] * (len(pairs) // 3)
    return words[3], words[4], dict(zip(pairs[1::3], pairs[2::3], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_command_gives_back_what_was_run_from_any_folder(tmp_path, monkeypatch, name):
    project = tmp_path / name
    monkeypatch.setattr(arguments, "PROJECT", project)
    (project / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(project)
    run, away = project / "runs" / name / "fmfa-0", ["/elsewhere/a b", str(project / "runs" / name)]
    parameters = {
        "run": str(run),
        "away": away,
        "seed": 3,
        "rate": 1e-5,
        "keep": True,
        "sentence": f"A {name}",
        "none": "",
    }
    record = {"notebook": str(project / "notebooks/04_evaluate.ipynb"), "output": str(run / "evaluate.ipynb")}
    command = notebook_command(record | {"given": dict.fromkeys(parameters, "as given"), "parameters": parameters})
    assert str(tmp_path) not in command.replace("/elsewhere", "")
    notebook, output, given = given_in(shell_words(command, project))
    assert notebook == "notebooks/04_evaluate.ipynb"
    assert os.path.abspath(output) == record["output"]
    assert os.path.abspath(given["run"]) == parameters["run"]
    assert [os.path.abspath(path) for path in json.loads(given["away"])] == away
    assert (given["seed"], float(given["rate"]), given["keep"], given["none"]) == ("3", 1e-5, "True", "")
    assert given["sentence"] == f"A {name}"


def test_a_record_without_resolved_parameters_shows_the_given_ones():
    record = {"notebook": ROOT / "notebooks/05_ablation.ipynb", "output": "/x/y.ipynb", "given": {"seeds": "2"}}
    assert notebook_command(record | {"parameters": None}).endswith("notebooks/05_ablation.ipynb /x/y.ipynb -p seeds 2")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_commands_in_the_notebooks_text_are_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    definition = yaml.safe_load((ROOT / "study.yml").read_text())
    for cell in nbformat.read(path, as_version=4).cells:
        for command in re.findall(r"((?:python -m fmfa|make study)[^`\"]*)[`\"]", cell.source):
            if command.startswith("make"):
                words = dict(word.split("=") for word in shlex.split(command)[2:])
                chosen = {"chosen": words["ROWS"]} if "ROWS" in words else {}
                assert read_study(definition | {"scale": words["SCALE"]} | chosen).runs
            elif "{" not in command:
                words = shell_words(command, ROOT)
                if words[2] != "fmfa.notebook":
                    assert importlib.util.find_spec(words[2]), command
                    continue
                notebook, _, given = given_in(words)
                resolve_parameters(notebook_parameters(notebook), given)


@pytest.mark.xdist_group("notebooks-1")
def test_a_system_is_trained_evaluated_and_compared_by_the_commands_that_are_printed(tmp_path, monkeypatch):
    project = tmp_path / "it's $HOME {a} project"
    (project / "notebooks").mkdir(parents=True)
    for name in ("fmfa", "data", "study.yml"):
        (project / name).symlink_to(ROOT / name)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        (project / "notebooks" / path.name).write_bytes(path.read_bytes())
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PYTHONPATH": str(project), "PATH": f"{bin_folder}:{os.environ['PATH']}",
                                "OMP_NUM_THREADS": "1"}  # fmt: skip

    def paste(command):
        done = subprocess.run(["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    def shown(path):
        assert json.loads(path.with_suffix(".status.json").read_text())["status"] == "finished"
        cells = nbformat.read(path, as_version=4).cells
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        text = "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)
        return text, sum("image/png" in output.get("data", {}) for output in outputs)

    results = project / "runs/mine"
    folder = results / "fmfa-0"
    training = {"method": "fmfa", "scale": "tiny", "epochs": 2, "seed": 3, "learning_rate": "5e-5",
                "log_gradients_every": 2, "run": "runs/mine/fmfa-0"}  # fmt: skip
    pairs = " ".join(f"-p {name} {value}" for name, value in training.items())
    paste(f"python -m fmfa.notebook notebooks/03_train.ipynb runs/mine/fmfa-0/train.ipynb {pairs}")
    text, figures = shown(folder / "train.ipynb")
    assert "192 training pairs, 24 identities" in text
    assert f"run folder: {folder}" in text
    assert figures == 3
    assert json.loads((folder / "config.json").read_text())["learning_rate"] == 5e-5
    following = re.search(r"next, in the project's folder: (.*)", text)[1]
    assert str(tmp_path) not in following
    paste(following)
    text, figures = shown(folder / "evaluate.ipynb")
    assert "ceiling of the captions" in text
    assert figures >= 4
    for name in ("train.html", "evaluate.html", "run.json", "metrics.csv", "queries-test.csv", "evaluation-test.json"):
        assert (folder / name).is_file(), name
    (results / "broken-0").mkdir()
    (results / "broken-0" / "run.json").write_text(json.dumps({"status": "failed", "error": "disk full"}))
    compare = "notebooks/05_ablation.ipynb runs/mine/comparison.ipynb -p results runs/mine -p baseline fmfa"
    paste(f"python -m fmfa.notebook {compare}")
    text, figures = shown(results / "comparison.ipynb")
    assert "No two rows share two seeds" in text
    assert figures >= 1
    table = run_results(read_results(results)).set_index("run")
    assert table.loc["broken-0", "status"] == "failed"
    queries = pd.read_csv(folder / "queries-test.csv")
    assert table.loc["fmfa-0", "R@1"] == pytest.approx(100 * (queries["first_rank"] == 1).mean())
    assert table.loc["fmfa-0", list(METRICS)].between(0, 100).all()

    paste("python -m fmfa.report runs/mine --shown fmfa-0")
    page = (project / "runs/mine/report.html").read_text()
    commands = [html.unescape(text) for text in re.findall(r'class="command"><code>(.*?)</code>', page)]
    assert len(commands) == 2
    monkeypatch.chdir(project)
    for command in commands:
        assert str(tmp_path) not in command
        notebook, output, given = given_in(shell_words(command, project))
        record = json.loads((project / output).with_suffix(".status.json").read_text())
        names = set(given)
        resolved = resolve_parameters(notebook_parameters(project / notebook), given)
        assert names == set(record["given"])
        for name in names:
            assert os.path.basename(str(resolved[name])) == os.path.basename(str(record["parameters"][name]))
    first, output = commands[0], project / given_in(shell_words(commands[0], project))[1]
    output.unlink()
    paste(first)
    assert output.is_file()


def test_paths_in_and_out_of_the_project():
    assert in_project(ROOT) == "."
    assert in_project(str(ROOT / "notebooks" / ".." / "runs" / "a b")) == "runs/a b"
    assert in_project([str(ROOT / "x"), 3, "name"]) == '["x", 3, "name"]'
    assert in_project(f"{ROOT}-other/x") == f"{ROOT}-other/x"
    assert in_project("/data/CUHK-PEDES") == "/data/CUHK-PEDES"
