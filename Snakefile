# The study as a workflow: data -> one training per run -> evaluation -> comparison and pictures -> report. Every step is
# a notebook executed by the package's runner; fmfa.study.definition reads study.yml. `make study` calls it, or a cluster does
# (README). Trainings and evaluations never start again because a notebook was edited: delete the run's folder for that.
# A step is done when its flag NAME.done lies beside NAME.ipynb, so that failed notebooks stay to be read and are retried.
# Commands are lists of words, quoted once (`shlex.join`); Snakemake sets OMP_NUM_THREADS to a job's threads.
import json
import os
import shlex
import sys
from pathlib import Path

from fmfa.errors import ConfigError
from fmfa.study.definition import read_definition, read_study

try:
    STUDY = read_study(read_definition() | config)
except ConfigError as error:
    raise WorkflowError(str(error)) from None
WEIGHTS = {"clip": "data/tiny_clip.safetensors", "irra": "data/tiny_clip.safetensors",
           "fmfa": "data/tiny_clip.safetensors", "ivt": "data/tiny_ivt.safetensors"}


def command(module, *words):
    """The command of a module, which ends when this process does."""
    words = [sys.executable, "-m", "fmfa.processes", os.getpid(), module, *words]
    return f"exec {shlex.join(map(str, words))}"


def execution(notebook, step, **parameters):
    """The command that executes notebooks/NOTEBOOK.ipynb to STEP.ipynb; lists go as JSON."""
    words = [f"notebooks/{notebook}.ipynb", f"{step}.ipynb"]
    for name, value in parameters.items():
        words += ["-p", name, json.dumps(value) if isinstance(value, list) else value]
    return command("fmfa.notebook", *words)


def training_data(wildcards):
    return ancient(f"{STUDY.data_step(STUDY.find(wildcards.run).data)}.done")


def test_data(wildcards):
    return ancient(f"{STUDY.data_step(STUDY.find(wildcards.run).tested)}.done")


def starting_weights(wildcards):
    parameters = STUDY.find(wildcards.run).parameters
    embedded = parameters["dataset"].startswith("SimPEDES") and "weights" not in parameters
    return ancient(WEIGHTS[parameters["method"]]) if embedded else []


def urgency(wildcards):
    """Priority of a training: seed by seed, and of each the longest first, so that no core waits for the last one."""
    run = STUDY.find(wildcards.run)
    return ("clip", "irra", "ivt", "fmfa").index(run.parameters["method"]) / 10 - run.seed


def trained(wildcards):
    run = STUDY.find(wildcards.run)
    return f"{run.source or run.folder}/train.done"


def evaluated(wildcards):
    runs = [run for run in (*STUDY.runs, *STUDY.cross) if run.folder.startswith(f"{wildcards.results}/")]
    return [f"{run.folder}/evaluate.done" for run in runs]


def baseline(results):
    wanted, rows = STUDY.settings["baseline"], [run.row for run in STUDY.results[results]]
    done = [path.parent.name.rpartition("-")[0] for path in Path(results).glob("*/evaluate.done")]
    return wanted if wanted in [*rows, *done] else rows[0]


def away(results):
    others = [other for other in STUDY.results if other != results and any(Path(other).glob("*/evaluate.done"))]
    return [os.path.abspath(other) for other in others]


def shown(results):
    """The first run of each row that the pictures show; of the others where none of those is there."""
    first = [run for run in STUDY.results[results] if run.seed == 0]
    return [run for run in first if run.row in STUDY.settings["shown"]] or first[:1]


def evaluation(wildcards):
    """Evaluate a run, or on another data set the run that this evaluation is of."""
    run = STUDY.find(wildcards.run)
    folder = os.path.abspath(run.source or run.folder)
    return execution("04_evaluate", f"{run.folder}/evaluate", **run.tested, run=folder)


wildcard_constraints:
    data="|".join(map(re.escape, STUDY.data)),
    run="|".join(map(re.escape, [run.folder for run in (*STUDY.runs, *STUDY.cross)])),
    results="|".join(map(re.escape, STUDY.results)),


localrules:
    all,
    evaluations,


rule all:
    input:
        f"{STUDY.folder}/report.html",


rule evaluations:
    input:
        [f"{run.folder}/evaluate.done" for run in (*STUDY.runs, *STUDY.cross)],


rule data:
    input:
        ancient("notebooks/01_data.ipynb"),
    output:
        touch("{data}.done"),
    params:
        lambda wildcards: execution("01_data", wildcards.data, **STUDY.data[wildcards.data]),
    threads: 2
    shell:
        "{params}"


rule clip_weights:
    output:
        "data/tiny_clip.safetensors",
    params:
        lambda wildcards, output: command("fmfa.pretrain", *output),
    threads: 2
    shell:
        "{params}"


rule ivt_weights:
    output:
        "data/tiny_ivt.safetensors",
    params:
        lambda wildcards, output: command("fmfa.pretrain", *output, "--method", "ivt"),
    threads: 2
    shell:
        "{params}"


rule train:
    input:
        training_data,
        starting_weights,
        ancient("notebooks/03_train.ipynb"),
    output:
        touch("{run}/train.done"),
    params:
        lambda wildcards: execution(
            "03_train",
            f"{wildcards.run}/train",
            **STUDY.find(wildcards.run).parameters,
            run=os.path.abspath(wildcards.run),
        ),
    priority: urgency
    resources:
        gpu=STUDY.settings["gpu"],
    shell:
        "{params}"


rule evaluate:
    input:
        trained,
        test_data,
        ancient("notebooks/04_evaluate.ipynb"),
    output:
        touch("{run}/evaluate.done"),
    params:
        evaluation,
    priority: 1 # what is trained is evaluated before another training begins
    resources:
        gpu=STUDY.settings["gpu"],
    shell:
        "{params}"


rule compare:
    input:
        evaluated,
        "notebooks/05_ablation.ipynb",
    output:
        touch("{results}/comparison.done"),
    params:
        lambda wildcards: execution(
            "05_ablation",
            f"{wildcards.results}/comparison",
            results=os.path.abspath(wildcards.results),
            baseline=baseline(wildcards.results),
            away=away(wildcards.results),
        ),
    shell:
        "{params}"


rule pictures:
    input:
        lambda wildcards: [f"{run.folder}/evaluate.done" for run in shown(wildcards.results)],
        "notebooks/06_visualise.ipynb",
    output:
        touch("{results}/pictures.done"),
    params:
        lambda wildcards: execution(
            "06_visualise",
            f"{wildcards.results}/pictures",
            **STUDY.results[wildcards.results][0].tested,
            runs=[os.path.abspath(run.folder) for run in shown(wildcards.results)],
            results=os.path.abspath(wildcards.results),
        ),
    resources:
        gpu=STUDY.settings["gpu"],
    shell:
        "{params}"


rule report:
    input:
        [f"{name}.done" for name in STUDY.data],
        expand("{results}/comparison.done", results=STUDY.results),
        expand("{results}/pictures.done", results=STUDY.results),
    output:
        f"{STUDY.folder}/report.html",
    params:
        lambda wildcards, output: command(
            "fmfa.report", STUDY.folder, *output, "--shown", *[f"{row}-0" for row in STUDY.settings["shown"]]
        ),
    shell:
        "{params}"
