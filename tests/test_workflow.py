"""The study's definition, its workflow (with stand-ins for the notebooks; killed, failing, resumed) and estimate."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fmfa.errors import ConfigError
from fmfa.models.objectives import objectives
from fmfa.parameters import notebook_parameters, resolve_parameters
from fmfa.plan import estimate, main
from fmfa.study import expand_rows, parse_arguments, read_study, select_rows
from fmfa.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
DEFINITION = yaml.safe_load((ROOT / "study.yml").read_text())
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
CORE = 14  # rows


def study(**words):
    return read_study(DEFINITION | words)


# The definition


def test_every_row_at_every_scale_is_a_training_configuration(tmp_path):
    declared = notebook_parameters(NOTEBOOKS / "02_train.ipynb")
    names = {setting.name for setting in fields(TrainConfig)}
    roots = {f"root_{name}": str(tmp_path) for name in DEFINITION["roots"]}
    seen = set()
    for scale in DEFINITION["scales"]:
        for run in study(scale=scale, chosen="all", seeds=1, **roots).runs:
            values = resolve_parameters(declared, run.parameters)
            config = TrainConfig(**{name: value for name, value in values.items() if name in names}).resolved()
            if config.method != "ivt":
                objectives(config.method, config.preset, config.dataset, **config.objective_overrides())
            for notebook, given in (("01_data", run.data), ("01_data", run.tested), ("03_evaluate", run.tested)):
                resolve_parameters(notebook_parameters(NOTEBOOKS / f"{notebook}.ipynb"), given)
            seen.add(run.row)
    assert seen == set(expand_rows(DEFINITION["rows"]))


def test_the_rows_that_a_scale_names_keep_their_epochs():
    for scale, names in (("quick", {"clip", "irra", "fmfa", "ivt"}), ("tiny", set())):
        assert {run.row for run in study(scale=scale).runs if run.parameters.get("keep_epochs")} == names


def test_rows_that_differ_in_name_differ_in_parameters():
    found = {}
    for row in expand_rows(DEFINITION["rows"]).values():
        same = found.setdefault(json.dumps(row.parameters, sort_keys=True), row.name)
        assert same == row.name, f"{row.name} trains the same as {same}"


def test_the_standard_scale_is_its_core_times_five_seeds():
    standard = study(scale="standard")
    assert len({run.row for run in standard.runs}) == CORE
    assert len(standard.runs) == CORE * 5
    assert len({run.folder for run in standard.runs}) == CORE * 5
    assert {run.parameters["scale"] for run in standard.runs} == {"small"}
    assert {run.tested["scale"] for run in (*standard.runs, *standard.cross)} == {"standard"}
    assert len(study(scale="standard", chosen="fmfa").runs) == 5
    assert len(study(scale="standard", chosen="fmfa-released").runs) == 2
    points = len(DEFINITION["rows"]["alpha"]["over"]["alpha"])
    assert len(study(scale="standard", chosen="fmfa alpha").runs) == 5 + points
    assert len(study(scale="standard", chosen="fmfa", seeds="3").runs) == 3


def test_each_scale_has_the_rows_that_its_settings_name():
    for name, settings in DEFINITION["scales"].items():
        rows = {row.name for row in select_rows(expand_rows(DEFINITION["rows"]), settings["rows"])}
        assert {settings["baseline"], *settings["shown"], *settings.get("cross", {"rows": []})["rows"]} <= rows, name


def test_a_curve_is_one_row_a_value():
    rows = expand_rows(
        {
            "alpha": {"method": "fmfa", "objectives": "asdm_alpha={alpha}", "over": {"alpha": [1, 0.5]}},
            "grid": {"learning_rate": "{rate}", "over": {"rate": [0.1, 0.2], "x": [3]}, "seeds": 1},
        }
    )
    assert [row.name for row in rows.values()] == ["alpha=1", "alpha=0.5", "grid_rate=0.1_x=3", "grid_rate=0.2_x=3"]
    assert rows["alpha=0.5"].parameters == {"method": "fmfa", "objectives": "asdm_alpha=0.5"}
    assert rows["grid_rate=0.2_x=3"].parameters == {"learning_rate": "0.2"}
    assert [row.name for row in select_rows(rows, "alpha")] == ["alpha=1", "alpha=0.5"]
    assert [row.name for row in select_rows(rows, "alpha=1")] == ["alpha=1"]
    with pytest.raises(ConfigError, match=r"no row 'alpa' in study\.yml; did you mean alpha"):
        select_rows(rows, "alpa")


def test_a_run_trained_on_one_domain_is_tested_on_the_other():
    for scale, other in (("standard", "SimPEDES-station"), ("station", "SimPEDES-street")):
        cross = study(scale=scale).cross
        assert {run.row for run in cross} == {"clip", "irra", "fmfa", "ivt"}
        assert {run.data["dataset"] for run in cross} == {other}
        for run in cross:
            assert run.source == f"runs/{scale}/{run.row}-{run.seed}"
            assert run.folder == f"runs/{scale}/on-{other}/{run.row}-{run.seed}"


def test_real_data_are_asked_for_by_name(tmp_path):
    listed = "CUHK-PEDES: no folder given\n  ICFG-PEDES: /nowhere\n  RSTPReid: no"
    with pytest.raises(ConfigError, match=listed) as error:
        study(**{"scale": "paper", "root_ICFG-PEDES": "/nowhere"})
    for word in ("make study SCALE=paper ROOTS=", "make check ROOT=", "GPU", "WEIGHTS="):
        assert word in str(error.value)
    one = study(**{"scale": "paper", "datasets": "RSTPReid", "root_RSTPReid": str(tmp_path), "weights": "/w.pt"})
    assert {run.results for run in one.runs} == {"runs/paper/RSTPReid"}
    assert not one.cross
    for run in one.runs:
        assert run.data == {"dataset": "RSTPReid", "root": str(tmp_path)}
        assert run.parameters.get("weights") == (None if run.row.startswith("ivt") else "/w.pt")
    two = study(**{"scale": "paper", "datasets": "RSTPReid ICFG-PEDES"} | {
        f"root_{name}": str(tmp_path) for name in ("RSTPReid", "ICFG-PEDES")
    })  # fmt: skip
    crossed = {(run.source.split("/")[2], run.data["dataset"]) for run in two.cross}
    assert crossed == {("RSTPReid", "ICFG-PEDES"), ("ICFG-PEDES", "RSTPReid")}


def test_an_unknown_scale_is_refused():
    with pytest.raises(ConfigError, match=r"no scale 'quik' in study\.yml; known are quick"):
        study(scale="quik")


# The estimate


def test_the_estimate_adds_up_what_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    costs = {"two-stream": 10.0, "irr": 20.0, "efa": 40.0, "ivt": 30.0, "mla": 90.0, "evaluate": 8.0, "notebook": 3.0}
    small = study(scale="quick", chosen="clip irra fmfa asdm ivt", seeds=2)
    table = estimate(small, costs, "cpu").set_index("row")
    epochs = DEFINITION["scales"]["quick"]["train"]["epochs"]
    seconds = {"clip": 10, "irra": 30, "fmfa": 70, "asdm": 30, "ivt": 90}
    for row, epoch in seconds.items():
        assert table.loc[row, "seconds a run"] == pytest.approx(3 + epochs * epoch + 3 + 8)
        assert table.loc[row, "seconds"] == pytest.approx(2 * (3 + epochs * epoch + 3 + 8))
    finished = tmp_path / "runs/quick/irra-0"
    finished.mkdir(parents=True)
    times = {"started": "2026-01-01T00:00:00+00:00", "finished": "2026-01-01T00:10:00+00:00"}
    config = TrainConfig(method="irra", epochs=epochs).resolved().to_dict()
    record = {"status": "finished", "config": config, "steps": 438, "device": "cpu: x", "resumed": [], **times}
    (finished / "run.json").write_text(json.dumps(record))
    (finished / "train.status.json").write_text('{"status": "finished"}')
    table = estimate(small, costs, "cpu").set_index("row")
    training = 3 + 600 / (438 * 64) * 5600 * epochs
    assert table.loc["irra", ["runs", "left", "from"]].tolist() == [2, 1, "finished runs"]
    assert table.loc["irra", "seconds"] == pytest.approx(training + 2 * (3 + 8))
    assert table.loc["asdm", "seconds"] == pytest.approx(2 * (training + 3 + 8))  # the same parts
    assert table.loc["fmfa", "from"] == "study.yml"
    assert estimate(small, costs, "cuda")["seconds"].isna().all()


def test_the_plan_is_told_in_minutes_or_hours(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "study.yml", tmp_path)
    monkeypatch.chdir(tmp_path)
    for words, told in (
        (["scale=quick"], r"4 runs, 4 to train; \d+ minutes on"),
        (["scale=standard"], r"\d\.\d hours on"),
    ):
        assert main(words) == 0
        assert re.search(told, capsys.readouterr().out)


# The workflow


def snakemake(folder, *words):
    command = ["snakemake", "--dry-run", "--cores", "2", *words]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path):
    """The workflow's files beside notebooks that only note that they ran."""
    for name in ("Snakefile", "study.yml", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("clip", "ivt"):
        (tmp_path / f"data/tiny_{name}.safetensors").touch()
    bodies = {
        "01_data": "print(dataset)",
        "02_train": TRAIN,
        "03_evaluate": "import pathlib\n(pathlib.Path(run) / 'queries-test.csv').write_text('')",
        "04_ablation": COMPARE,
        "05_visualise": "print('shown', *[path.split('/')[-1] for path in runs])",
    }
    for name, body in bodies.items():
        cells = [cell for cell in nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells if cell.metadata.get("tags")]
        parameters = next(cell for cell in cells if "parameters" in cell.metadata["tags"])
        cells = [new_markdown_cell(f"# The question of {name}"), parameters, new_code_cell(body)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / f"{name}.ipynb")
    return tmp_path


TRAIN = """
import json, pathlib, time
folder = pathlib.Path(run)
with (folder / "attempts").open("a") as file:
    file.write("x")
while (folder.parents[2] / f"hold-{method}").exists():
    time.sleep(0.05)
failing = (folder.parents[2] / f"fail-{method}").exists()
(folder / "run.json").write_text(json.dumps({"status": "failed" if failing else "finished"}))
assert not failing, "the disk is full"
"""
COMPARE = """
import pathlib
print("compared", *sorted(path.parent.name for path in pathlib.Path(results).glob("*/queries-test.csv")))
"""


@pytest.mark.parametrize("scale", ["quick", "standard"])
def test_the_workflow_plans_one_training_and_one_evaluation_a_run(project, scale):
    plan = snakemake(project, "--config", f"scale={scale}")
    assert plan.returncode == 0, plan.stdout + plan.stderr
    expected = study(scale=scale)
    counts = {
        "data": {"quick": 1, "standard": 3}[scale],
        "train": len(expected.runs),
        "evaluate": len(expected.runs) + len(expected.cross),
        "compare": 1,
        "pictures": 1,
        "report": 1,
    }
    for rule, count in counts.items():
        assert plan.stdout.count(f"rule {rule}:") == count, rule
    assert "weights:" not in plan.stdout
    urgency = {}
    for rule, block in re.findall(r"rule (train|evaluate):\n(.*?resources)", plan.stdout, flags=re.DOTALL):
        row, seed = re.search(r"output: runs/\w+/(?:on-[\w-]+/)?([\w-]+)-(\d)/", block).groups()
        priority = re.search(r"priority: (\S+)", block)
        urgency[rule, row, int(seed)] = float(priority[1]) if priority else 0.0
    trainings = [value for (rule, *_), value in urgency.items() if rule == "train"]
    assert min(value for (rule, *_), value in urgency.items() if rule == "evaluate") > max(trainings)
    for seed in range(expected.settings["seeds"]):
        times = [urgency["train", row, seed] for row in ("fmfa", "ivt", "irra", "clip")]
        assert times == sorted(times, reverse=True)
        assert len(set(times)) == 4
        assert all(value < times[-1] for (rule, _, later), value in urgency.items() if rule == "train" and later > seed)


def test_the_cluster_profile_asks_for_a_gpu_a_training(project, tmp_path):
    data = tmp_path / "rstp"
    data.mkdir()
    words = ["scale=paper", "datasets=RSTPReid", f"root_RSTPReid={data}", "chosen=irra", "seeds=1"]
    # The Slurm plugin is not part of the environment; a dry run stands in for it.
    plan = snakemake(project, "--profile", "profiles/slurm", "--executor", "dryrun", "--config", *words)
    assert plan.returncode == 0, plan.stdout + plan.stderr
    job = plan.stdout[plan.stdout.index("rule train:") :].split("rule ")[1]
    for word in ("gpu=1", "runtime=2880", "mem_mb=32000"):
        assert word in job
    missing = snakemake(project, "--config", "scale=paper")
    assert missing.returncode != 0
    assert "CUHK-PEDES: no folder given" in missing.stdout + missing.stderr


def test_a_comparison_is_given_the_evaluated_runs_of_the_other_data_sets(project):
    names = ("ICFG-PEDES", "RSTPReid")
    words = ["scale=paper", f"datasets={' '.join(names)}", *(f"root_{name}={project}" for name in names)]
    done = project / "runs/paper/RSTPReid/irra-0/evaluate.done"
    done.parent.mkdir(parents=True)
    done.touch()
    plan = snakemake(project, "--printshellcmds", "--config", *words, "chosen=irra", "seeds=1")
    assert plan.returncode == 0, plan.stdout + plan.stderr
    given = re.findall(r"04_ablation.ipynb runs/paper/([\w-]+)/.* -p away (\S+)", plan.stdout)
    assert dict(given) == {"ICFG-PEDES": f"'[\"{project}/runs/paper/RSTPReid\"]'", "RSTPReid": "'[]'"}


def make(folder, *words):
    # -o: the environment is taken as it is
    command = ["make", "-o", ".venv/.ready", f"BIN={Path(sys.executable).parent}", "SCALE=tiny", *words]
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def status(folder, step):
    path = folder / f"{step}.status.json"
    return json.loads(path.read_text())["status"] if path.is_file() else ""


def wait_for(condition, process, seconds=900):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "the workflow does not get there"
        time.sleep(0.1)


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one run must finish while another is held up: two cores")
def test_a_killed_study_keeps_what_is_finished_and_a_failed_run_stays_visible(project):
    clip, irra = (project / "runs/tiny" / name for name in ("clip-0", "irra-0"))
    (project / "hold-irra").touch()
    (project / "fail-irra").touch()
    first = make(project, "study")
    wait_for(lambda: status(clip, "evaluate") == "finished" and (irra / "attempts").is_file(), first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert status(irra, "train") == "running"

    (project / "hold-irra").unlink()
    second = make(project, "study")
    text = second.communicate(timeout=900)[0]
    assert second.returncode != 0, text
    assert (clip / "attempts").read_text() == "x"
    assert (irra / "attempts").read_text() == "xx"
    assert status(irra, "train") == "failed"
    assert "the disk is full" in (irra / "train.ipynb").read_text()
    page = (project / "runs/tiny/report.html").read_text()
    assert f"The report: {project}/runs/tiny/report.html" in text
    assert "compared clip-0\n" in page
    assert "the disk is full" in page

    (project / "fail-irra").unlink()
    third = make(project, "study")
    text = third.communicate(timeout=900)[0]
    assert third.returncode == 0, text
    assert (clip / "attempts").read_text() == "x"
    assert (irra / "attempts").read_text() == "xxx"
    page = (project / "runs/tiny/report.html").read_text()
    assert "compared clip-0 irra-0\n" in page
    assert "shown irra-0\n" in page
    assert "the disk is full" not in page


def test_command_line_words_override_the_definition():
    config = parse_arguments(["scale=tiny", "root_X=/a=b"], ROOT / "study.yml")
    assert (config["scale"], config["root_X"]) == ("tiny", "/a=b")
