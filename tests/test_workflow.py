"""The study's definition, its workflow (with stand-ins for the notebooks; killed, failing, resumed) and estimate."""

import contextlib
import copy
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import nbformat
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from fmfa.errors import ConfigError
from fmfa.models.objectives import objectives
from fmfa.notebook import notebook_parameters, resolve_parameters
from fmfa.study.definition import expand_rows, parse_arguments, read_study, select_rows
from fmfa.training.config import TrainConfig
from fmfa.workflow import Watch, main

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
DEFINITION = yaml.safe_load((ROOT / "study.yml").read_text())
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
ENVIRONMENT |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
CORE = 14  # rows


def study(**words):
    return read_study(DEFINITION | words)


# The definition


def test_every_row_at_every_scale_is_a_training_configuration(tmp_path):
    declared = notebook_parameters(NOTEBOOKS / "03_train.ipynb")
    names = {setting.name for setting in fields(TrainConfig)}
    roots = {f"root_{name}": str(tmp_path) for name in DEFINITION["roots"]}
    seen = set()
    for scale in DEFINITION["scales"]:
        for run in study(scale=scale, chosen="all", seeds=1, **roots).runs:
            values = resolve_parameters(declared, run.parameters)
            config = TrainConfig(**{name: value for name, value in values.items() if name in names}).resolved()
            if config.method != "ivt":
                objectives(config.method, config.preset, config.dataset, **config.objective_overrides())
            for notebook, given in (("01_data", run.data), ("01_data", run.tested), ("04_evaluate", run.tested)):
                resolve_parameters(notebook_parameters(NOTEBOOKS / f"{notebook}.ipynb"), given)
            seen.add(run.row)
    assert seen == set(expand_rows(DEFINITION["rows"]))


def test_the_rows_that_a_scale_names_keep_their_epochs():
    for scale, names in (("quick", {"clip", "irra", "fmfa", "ivt"}), ("tiny", set())):
        assert {run.row for run in study(scale=scale).runs if run.parameters.get("keep_epochs")} == names


def test_rows_that_differ_in_name_differ_in_parameters():
    found = {}
    for row in expand_rows(DEFINITION["rows"]).values():
        same = found.setdefault(json.dumps([row.parameters, row.passes], sort_keys=True), row.name)
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


def test_the_wide_scale_trains_on_other_people_for_each_seed_and_tests_on_the_same():
    wide = study(scale="wide")
    assert len(wide.runs) == 3 * len({run.row for run in wide.runs}) > 3 * CORE
    for run in wide.runs:
        assert run.parameters["augmentation"] == ("full" if run.row.endswith("augmented") else "none")
        assert run.parameters.get("learning_rate") == (0.002 if run.parameters["method"] == "clip" else None)
        assert run.data == {"dataset": "SimPEDES-street", "scale": "wide", "data_seed": run.seed}
        assert run.tested == {"dataset": "SimPEDES-street", "scale": "wide", "data_seed": 0}
    steps = [f"runs/wide/data-SimPEDES-street-wide{end}" for end in ("", "-1", "-2")]
    assert sorted(step for step in wide.data if "street" in step) == steps
    assert [wide.data[step]["data_seed"] for step in steps] == [0, 1, 2]


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


def test_a_row_makes_more_passes_than_its_scale(tmp_path):
    lengths = {
        run.row: (run.parameters["epochs"], run.parameters.get("warmup_epochs")) for run in study(scale="wide").runs
    }
    assert (lengths["fmfa"], lengths["plain"], lengths["plain-once"]) == ((1, 0.2), (3, 0.6), (1, 0.2))
    data = {"datasets": "ICFG-PEDES", "root_ICFG-PEDES": str(tmp_path)}
    paper = {run.row: run for run in study(scale="paper", chosen="plain fmfa", **data).runs}
    assert (paper["fmfa"].parameters["epochs"], paper["plain"].parameters["epochs"]) == (
        -1,
        300,
    )  # the preset's are 100
    assert "augmentation" not in paper["plain"].parameters
    with pytest.raises(ConfigError, match=r"rows\.plain\.passes"):
        study(rows=DEFINITION["rows"] | {"plain": {"method": "clip", "passes": 0}})


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


@pytest.mark.parametrize("folder", ["a b", "b c=d", "RSTPReid"])
def test_data_sets_have_one_name_in_every_spelling(tmp_path, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / "rstp").mkdir()
    folders = f"icfg_pedes={tmp_path / folder}  rstp={tmp_path / 'rstp'} "
    asked = study(scale="paper", datasets="RSTP-Reid icfg rstpreid", folders=folders)
    roots = {"RSTPReid": str(tmp_path / "rstp"), "ICFG-PEDES": str(tmp_path / folder)}
    assert {run.data["dataset"]: run.data["root"] for run in (*asked.runs, *asked.cross)} == roots
    assert set(asked.results) == {"runs/paper/RSTPReid", "runs/paper/ICFG-PEDES"}
    assert asked == study(scale="paper", datasets="RSTPReid ICFG-PEDES", roots=DEFINITION["roots"] | roots)
    paper = DEFINITION["scales"]["paper"] | {"datasets": ["rstp", "icfg"], "cross": {"datasets": ["ICFG"]}}
    defined = study(scale="paper", scales={"paper": paper}, root_icfg=roots["ICFG-PEDES"], root_RSTP=roots["RSTPReid"])
    assert {run.data["dataset"]: run.data["root"] for run in defined.runs} == roots
    alone = study(scale="quick", datasets="simpedes_STREET")
    assert {run.data["dataset"] for run in alone.runs} == {"SimPEDES-street"}
    with pytest.raises(ConfigError, match="did you mean CUHK-PEDES"):
        study(scale="paper", folders=f"CUKH-PEDES={tmp_path}")


def test_an_unknown_scale_is_refused():
    with pytest.raises(
        ConfigError, match=r"no scale 'quik' in study\.yml; did you mean quick\? known are quick, tuning"
    ):
        study(scale="quik")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"seeds": "two"}, "seeds: should be a valid integer.*'two'"),
        ({"seeds": 0}, "seeds: should be greater than or equal to 1, found 0"),
        ({"seeds": "-1"}, "seeds: should be greater than or equal to 1, found '-1'"),
        ({"scal": "tiny"}, "^scal: unknown name"),
        ({"datasets": "a;touch"}, "datasets.0: only letters, digits and .* make a name, found 'a;touch'"),
        ({"folders": "X=/a b"}, r'ROOTS has \'X=/a b\'; expected "NAME=FOLDER" with NAME one of .*RSTPReid'),
        (
            {"scales": {"quick": {**DEFINITION["scales"]["quick"], "sede": 2}}},
            "study.yml, scales.quick.sede: unknown name",
        ),
        (
            {"scales": {"quick": {**DEFINITION["scales"]["quick"], "baseline": "ira"}}},
            "no row 'ira'.*did you mean irra",
        ),
        ({"datasets": "../x"}, "datasets.0: only letters"),
        ({"datasets": "{a}"}, "datasets.0: only letters"),
        ({"rows": {"x": {}}}, r"study.yml, rows.x.method: missing"),
        ({"rows": {"a/b": {"method": "clip"}}}, "study.yml, rows.a/b: only letters"),
        ({"rows": {"x": {"method": "clip", "mask_rate": [1]}}}, "study.yml, rows.x: mask_rate must be text, a number"),
        ({"rows": {"x": {"method": "clip", "root": "/"}}}, "study.yml, rows.x: root cannot be set here"),
        ({"seconds": {**DEFINITION["seconds"], "irra": "slow"}}, "study.yml, seconds.irra: .*'slow'"),
    ],
)
def test_what_is_not_of_its_form_is_one_sentence_that_names_the_place(words, told):
    with pytest.raises(ConfigError, match=told) as error:
        study(**words)
    assert "\n" not in str(error.value)


WORDS = st.sampled_from(
    [None, True, 0, -1, 10**12, math.nan, "", "{", "{alpha}", "a/b", "../x", "\0", "é", [], [None], {}]
)


@st.composite
def damaged_definitions(draw):
    """study.yml with a value of any depth replaced, renamed or taken out, or with bytes changed."""
    if draw(st.booleans()):
        content = bytearray((ROOT / "study.yml").read_bytes())
        for _ in range(draw(st.integers(1, 3))):
            start = draw(st.integers(0, len(content) - 1))
            content[start : start + draw(st.integers(0, 20))] = draw(
                st.binary(max_size=4) | st.sampled_from([b"{", b": "])
            )
        return bytes(content)
    content = node = copy.deepcopy(DEFINITION)
    while True:
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if not node[key] or not isinstance(node[key], dict | list) or draw(st.booleans()):
            break
        node = node[key]
    change = draw(st.sampled_from(["value", "name", "none"]))
    old = node.pop(key) if change != "value" or isinstance(node, dict) else node[key]
    if change == "value":
        node[key] = draw(WORDS)
    elif change == "name" and isinstance(node, dict):
        node[draw(st.sampled_from([None, 3, "", "a b", "x", "method", "{x}"]))] = old
    return content


@hypothesis.given(damaged_definitions())
@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.example(b"rows: " + b"[" * 1000)
@hypothesis.example(b"rows: {a: &a {method: clip, x: *a}}")
@hypothesis.example(
    DEFINITION | {"scales": DEFINITION["scales"] | {"quick": DEFINITION["scales"]["quick"] | {"test": {"scale": "x"}}}}
)
@hypothesis.example(DEFINITION | {"rows": {"a": {"method": "clip", "over": {"a": ["x/y"]}}}})
def test_a_damaged_definition_is_a_config_error_or_none(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "study.yml"
        path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        for scale in ("quick", "standard"):
            with contextlib.suppress(ConfigError):
                Watch(read_study(parse_arguments([f"scale={scale}"], path)), 2)


# What is left


def note(step, state, start=0, end=0, error=None):
    """The runner's record of a step, with its times in seconds of a day."""
    path = Path(f"{step}.status.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    times = {
        name: f"2026-01-01T{at // 3600:02}:{at // 60 % 60:02}:{at % 60:02}+00:00"
        for name, at in (("started", start), ("finished", end))
    }
    path.write_text(json.dumps({"status": state, "error": error, **times}))


def test_what_is_left_takes_what_the_same_took_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = study(scale="quick", chosen="clip irra asdm", seeds=2)
    costs, epochs = DEFINITION["seconds"], DEFINITION["scales"]["quick"]["train"]["epochs"]
    watch = Watch(quick, 1)
    for row, method in (("clip", "clip"), ("irra", "irra"), ("asdm", "fmfa")):
        assert watch.seconds(f"runs/quick/{row}-1/train") == epochs * costs[method]
    others = 6 * costs["evaluate"] + costs["data"] + costs["comparison"] + costs["pictures"]
    assert watch.left() == 2 * epochs * (costs["clip"] + costs["irra"] + costs["fmfa"]) + others
    note("runs/quick/irra-0/train", "finished", end=1000)
    note("runs/quick/irra-0/evaluate", "finished", start=1000, end=1007)
    rows = "".join(f"r,train,{epoch},9,seconds,{epoch}00\n" for epoch in range(1, epochs + 1))
    Path("runs/quick/irra-0/metrics.csv").write_text(f"run,split,epoch,step,metric,value\n{rows}")
    watch = Watch(quick, 2)
    assert watch.seconds("runs/quick/irra-1/train") == 100 * sum(range(1, epochs + 1))
    assert watch.seconds("runs/quick/clip-1/train") == epochs * costs["clip"]
    assert watch.seconds("runs/quick/clip-1/evaluate") == 7
    assert not {"runs/quick/irra-0/train", "runs/quick/irra-0/evaluate"} & watch.ahead
    large = study(scale="full", chosen="irra", seeds=1)
    assert Watch(large, 1).seconds("runs/full/irra-0/train") == pytest.approx(4 * costs["irra"] * 2500 / 700)


def test_the_plan_counts_jobs_and_is_told_in_minutes_or_hours(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / "study.yml", tmp_path)
    monkeypatch.chdir(tmp_path)
    for words, told in (
        (["scale=quick"], r"4 runs, 4 to train; jobs left: .*4 evaluate.*\n\d+ minutes on"),
        (["scale=standard"], r"70 runs, 70 to train; .*\n\d+\.\d hours on"),
    ):
        assert main(["plan", *words]) == 0
        assert re.search(told, capsys.readouterr().out)
    assert not (tmp_path / "runs").exists()
    assert main(["plan", "scale=paper", f"folders=RSTPReid={tmp_path}", "datasets=RSTPReid"]) == 0
    assert "Without 45 trainings" in capsys.readouterr().out


# The workflow


def snakemake(folder, *words):
    command = ["snakemake", "--dry-run", "--cores", "2", *words]
    return subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path):
    """The workflow's files beside notebooks that only note that they ran, in a folder to which shells say much."""
    tmp_path = tmp_path / "it's {a} $HOME & [b]; c"
    tmp_path.mkdir()
    for name in ("Snakefile", "study.yml", "Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("clip", "ivt"):
        (tmp_path / f"data/tiny_{name}.safetensors").touch()
    bodies = {
        "01_data": "print(dataset)",
        "03_train": TRAIN,
        "04_evaluate": "import pathlib\n(pathlib.Path(run) / 'queries-test.csv').write_text('')",
        "05_ablation": COMPARE,
        "06_visualise": "print('shown', *[path.split('/')[-1] for path in runs])",
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
rows = "run,split,epoch,step,metric,value\\nr,train,1,9,loss/total,2.5\\nr,train,1,9,seconds,40\\nr,val,1,9,R@1,0.25\\n"
(folder / "metrics.csv").write_text(rows)
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
    commands = [shlex.split(line) for line in plan.stdout.splitlines() if "notebooks/05_ablation.ipynb" in line]
    away = {
        Path(words[words.index("notebooks/05_ablation.ipynb") + 1]).parent.name: words[words.index("away") + 1]
        for words in commands
        if "away" in words
    }
    assert away == {"ICFG-PEDES": json.dumps([f"{project}/runs/paper/RSTPReid"]), "RSTPReid": "[]"}


def make(folder, *words):
    # -o: the environment is taken as it is
    command = ["make", "-o", ".venv/.ready", f"BIN={Path(sys.executable).parent}", "SCALE=tiny", *words]
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT | {"STUDY": str(folder)}, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job would ignore it
    )  # fmt: skip


def living(folder):
    """The processes that a `make` of this folder started and that are still there."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("STUDY") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


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
    assert re.search("irra-0/train: FAILED, AssertionError: the disk is full .see runs/tiny/irra-0/train.html", text)
    assert "failed: irra-0/train; make study tries again" in text
    page = (project / "runs/tiny/report.html").read_text()
    assert f"The report: {project}/runs/tiny/report.html" in text
    assert "compared clip-0\n" in page
    assert "the disk is full" in page

    (project / "fail-irra").unlink()
    third = make(project, "study")
    text = third.communicate(timeout=900)[0]
    assert third.returncode == 0, text
    lines = [re.sub(r"^\d\d:\d\d  |; about .* to go$", "", line) for line in text.splitlines()]
    told = ["irra-0/train: started", "irra-0/train: epoch 1 of 1, loss 2.500, R@1 on validation 25.0 %"]
    assert [line for line in lines if "irra-0/train" in line and "finished" not in line] == told
    assert not any("clip-0" in line for line in lines)
    assert sum("comparison: finished in" in line for line in lines) == 1
    assert len(lines) < 40
    assert (clip / "attempts").read_text() == "x"
    assert (irra / "attempts").read_text() == "xxx"
    page = (project / "runs/tiny/report.html").read_text()
    assert "compared clip-0 irra-0\n" in page
    assert "shown irra-0\n" in page
    assert "the disk is full" not in page


def test_command_line_words_override_the_definition():
    config = parse_arguments(["scale=tiny", "root_X=/a=b"], ROOT / "study.yml")
    assert (config["scale"], config["root_X"]) == ("tiny", "/a=b")


def test_a_second_study_waits_for_the_first_and_an_ended_one_leaves_no_process(project):
    irra = project / "runs/tiny/irra-0"
    (project / "hold-irra").touch()
    (project / "hold-clip").touch()
    ends = {
        "Ctrl-C": lambda process: os.killpg(process.pid, signal.SIGINT),
        "SIGTERM": lambda process: process.terminate(),
        "SIGKILL": lambda process: process.kill(),
    }
    for number, (name, end) in enumerate(ends.items(), start=1):
        first = make(project, "study")
        wait_for(
            lambda number=number: (irra / "attempts").is_file() and (irra / "attempts").stat().st_size == number, first
        )
        if number == 1:
            for what in ("study", "report"):
                second = make(project, what)
                text = second.communicate(timeout=120)[0]
                assert second.returncode != 0
                assert re.search(r"^error: runs/tiny is in use by process \d+", text), text
            assert first.poll() is None
            assert status(irra, "train") == "running"
        end(first)
        first.communicate(timeout=120)
        _, left = psutil.wait_procs(living(project), timeout=20)
        assert not left, name
        assert status(irra, "train") == ("running" if name == "SIGKILL" else "interrupted")


def test_what_is_given_reaches_the_steps_as_it_is_and_is_never_run(project):
    touched = project / "touched"
    folder = project / f"a b;touch {touched.name};$(touch {touched.name})`touch {touched.name}` 'c' \"d\" {{e}} $$HOME"
    folder.mkdir()
    definition = yaml.safe_load((project / "study.yml").read_text())
    value = f"x;touch {touched.name} '$(touch {touched.name})' {{input}}"
    definition["rows"]["clip"]["backbone"] = value
    (project / "study.yml").write_text(yaml.safe_dump(definition))
    words = (
        "SCALE=paper",
        "DATASETS=RSTPReid",
        "ROWS=clip",
        "SEEDS=1",
        f"ROOTS=RSTPReid={folder}",
        f"WEIGHTS={folder}",
    )
    process = make(project, "study", *words)
    text = process.communicate(timeout=900)[0]
    assert process.returncode == 0, text
    given = json.loads((project / "runs/paper/RSTPReid/clip-0/train.status.json").read_text())["given"]
    assert (given["root"], given["weights"], given["backbone"]) == (str(folder), str(folder), value)
    assert given["run"] == f"{project}/runs/paper/RSTPReid/clip-0"
    process = make(project, "check", f"ROOT={folder}")
    assert str(folder) in process.communicate(timeout=120)[0]
    definition["scales"]["tiny"]["datasets"] = [f"x;touch {touched.name}"]
    (project / "study.yml").write_text(yaml.safe_dump(definition))
    assert "only letters" in snakemake(project, "--config", "scale=tiny").stdout
    assert not touched.exists()
    assert not list(project.rglob("touched"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["study", "SCALE=quik"], "error: no scale 'quik' in study.yml; did you mean quick?"),
        (["plan", "SEEDS=two"], "error: seeds: should be a valid integer"),
        (["check"], "Which data set? make check ROOT=/data/CUHK-PEDES"),
        (["report"], "error: no run of runs/tiny is evaluated yet: make study SCALE=tiny"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(project, words, told):
    process = make(project, *words)
    first, *others = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode != 0
    assert first.startswith(told)
    assert [line.split(":")[0] for line in others] == ["make"]


def test_the_time_that_is_left_is_told_after_every_epoch_and_now_and_then(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    now = [0.0]
    monkeypatch.setattr("fmfa.workflow.time.monotonic", lambda: now[0])
    watch = Watch(study(scale="standard", chosen="clip", seeds=2, datasets="SimPEDES-street"), slots=2)
    folder = "runs/standard"

    def lines():
        watch.look()
        return [line[7:] for line in capsys.readouterr().out.splitlines()]

    assert lines() == []
    note(f"{folder}/clip-0/train", "running")
    (line,) = lines()
    assert re.fullmatch(r"clip-0/train: started; about \d+ minutes to go", line)
    seen = []
    log = Path(f"{folder}/clip-0/metrics.csv")
    log.write_text("run,split,epoch,step,metric,value\nr,val,0,0,R@1,0.1\n")
    for epoch in range(1, 6):
        for _ in range(40):
            now[0] += 10
            seen += lines()
        with log.open("a") as file:
            file.write(f"r,train,{epoch},9,loss/total,{5 - epoch}\nr,train,{epoch},9,seconds,400\n")
        seen += lines()
        with log.open("a") as file:
            file.write(f"r,val,{epoch},9,R@1,0.{epoch}\n")
        seen += lines()
    epochs = [line for line in seen if "epoch" in line]
    assert epochs[1].startswith(
        "clip-0/train: epoch 2 of 5, loss 3.000, R@1 on validation 20.0 %, 20 minutes left; about "
    )
    assert len(epochs) == 5
    assert all(line.startswith("running: clip-0/train (") for line in seen if line not in epochs)
    assert 15 < len(seen) - 5 <= 2000 / 60
    note(f"{folder}/clip-0/train", "finished", end=2000)
    assert lines()[0].startswith("clip-0/train: finished in 33 minutes")
    assert watch.left() == 5 * 400  # the other training, alone in the end
    error = "TrainingError: the loss is\nnot finite"
    note(f"{folder}/clip-1/train", "failed", start=2000, end=2010, error=error)
    assert lines()[1].startswith(
        "clip-1/train: FAILED, TrainingError: the loss is not finite (see runs/standard/clip-1/train.html)"
    )
    assert watch.failed == [f"{folder}/clip-1/train"]
    ahead = {step for step in watch.kinds if not step.endswith("train")} - {f"{folder}/clip-1/evaluate"}
    assert watch.ahead == ahead
    assert watch.left() == sum(map(watch.seconds, ahead)) / 2


def test_on_real_data_the_first_epoch_tells_how_long_it_will_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paper = study(
        **{"scale": "paper", "datasets": "RSTPReid", "root_RSTPReid": str(tmp_path), "chosen": "clip", "seeds": 2}
    )
    watch = Watch(paper, slots=1)
    steps = [f"runs/paper/RSTPReid/clip-{seed}/train" for seed in (0, 1)]
    assert watch.count == dict.fromkeys(steps, 60)  # the papers' epochs
    assert math.isnan(watch.left())
    folder = Path(steps[0]).parent
    folder.mkdir(parents=True)
    (folder / "train.status.json").write_text('{"status": "running", "started": "2026"}')
    (folder / "metrics.csv").write_text(
        "run,split,epoch,step,metric,value\nr,train,1,9,seconds,100\nr,val,1,9,R@1,0.3\n"
    )
    watch.look()
    others = sum(watch.seconds(step) for step in watch.ahead if step not in steps)
    assert watch.left() == pytest.approx(59 * 100 + 60 * 100 + others, abs=1)
