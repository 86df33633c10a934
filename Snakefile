# The study as a workflow: data -> one training a run -> evaluation -> comparison and pictures -> report. Every step is
# a notebook executed by the package's runner; fmfa.study reads study.yml. `make study` calls it, or a cluster does
# (README). Trainings and evaluations never start again because a notebook was edited: delete the run's folder for that.
# A step is done when its flag NAME.done lies beside NAME.ipynb, so that failed notebooks stay to be read and are retried.
import json
import os
import shlex
from glob import glob

from fmfa.errors import ConfigError
from fmfa.study import read_study


configfile: "study.yml"


try:
    STUDY = read_study(config)
except ConfigError as error:
    raise WorkflowError(str(error)) from None
WEIGHTS = {"clip": "data/tiny_clip.safetensors", "irra": "data/tiny_clip.safetensors",
           "fmfa": "data/tiny_clip.safetensors", "ivt": "data/tiny_ivt.safetensors"}
RUN = "OMP_NUM_THREADS={threads} python -m fmfa.runner"


def given(values):
    return " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in values.items())


def quoted(folders):
    """A list of folders as a parameter of the runner's command line."""
    return shlex.quote(json.dumps([os.path.abspath(folder) for folder in folders]))


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


def baseline(wildcards):
    wanted, rows = STUDY.settings["baseline"], [run.row for run in STUDY.results[wildcards.results]]
    there = wanted in rows or any(glob(f"{wildcards.results}/{wanted}-*/evaluate.done"))
    return wanted if there else rows[0]


def shown(wildcards):
    """The first run of each row that the pictures show; of the others where none of those is there."""
    first = [run for run in STUDY.results[wildcards.results] if run.seed == 0]
    return [run for run in first if run.row in STUDY.settings["shown"]] or first[:1]


def linked(wildcards):
    """A cross-domain evaluation gets a run folder of its own, with links to the run's record and checkpoints."""
    run = STUDY.find(wildcards.run)
    if not run.source:
        return "true"
    names = "run.json config.json metrics.csv vocab.txt checkpoints"
    source, folder = shlex.quote(os.path.abspath(run.source)), shlex.quote(run.folder)
    return f"for name in {names}; do if [ -e {source}/$name ]; then ln -sfn {source}/$name {folder}/$name; fi; done"


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
        values=lambda wildcards: given(STUDY.data[wildcards.data]),
    threads: 2
    shell:
        f"{RUN} {{input}} {{wildcards.data}}.ipynb {{params.values}}"


rule clip_weights:
    output:
        "data/tiny_clip.safetensors",
    threads: 2
    shell:
        "python -m fmfa.pretrain {output}"


rule ivt_weights:
    output:
        "data/tiny_ivt.safetensors",
    threads: 2
    shell:
        "python -m fmfa.pretrain {output} --method ivt"


rule train:
    input:
        training_data,
        starting_weights,
        notebook=ancient("notebooks/02_train.ipynb"),
    output:
        touch("{run}/train.done"),
    params:
        values=lambda wildcards: given(STUDY.find(wildcards.run).parameters),
        folder=lambda wildcards: os.path.abspath(wildcards.run),
    priority: urgency
    resources:
        gpu=STUDY.settings.get("gpu", 0),
    shell:
        f"{RUN} {{input.notebook}} {{wildcards.run}}/train.ipynb {{params.values}} -p run {{params.folder}}"


rule evaluate:
    input:
        trained,
        test_data,
        notebook=ancient("notebooks/03_evaluate.ipynb"),
    output:
        touch("{run}/evaluate.done"),
    priority: 1 # what is trained is evaluated before another training begins
    params:
        links=linked,
        values=lambda wildcards: given(STUDY.find(wildcards.run).tested),
        folder=lambda wildcards: os.path.abspath(wildcards.run),
    resources:
        gpu=STUDY.settings.get("gpu", 0),
    shell:
        f"{{params.links}} && {RUN} {{input.notebook}} {{wildcards.run}}/evaluate.ipynb {{params.values}}"
        " -p run {params.folder}"


rule compare:
    input:
        evaluated,
        notebook="notebooks/04_ablation.ipynb",
    output:
        touch("{results}/comparison.done"),
    params:
        folder=lambda wildcards: os.path.abspath(wildcards.results),
        baseline=baseline,
        away=lambda wildcards: quoted(
            other for other in STUDY.results if other != wildcards.results and glob(f"{other}/*/evaluate.done")
        ),
    shell:
        f"{RUN} {{input.notebook}} {{wildcards.results}}/comparison.ipynb -p results {{params.folder}}"
        " -p baseline {params.baseline} -p away {params.away}"


rule pictures:
    input:
        lambda wildcards: [f"{run.folder}/evaluate.done" for run in shown(wildcards)],
        notebook="notebooks/05_visualise.ipynb",
    output:
        touch("{results}/pictures.done"),
    params:
        folder=lambda wildcards: os.path.abspath(wildcards.results),
        runs=lambda wildcards: quoted(run.folder for run in shown(wildcards)),
        values=lambda wildcards: given(STUDY.results[wildcards.results][0].tested),
    resources:
        gpu=STUDY.settings.get("gpu", 0),
    shell:
        f"{RUN} {{input.notebook}} {{wildcards.results}}/pictures.ipynb {{params.values}} -p runs {{params.runs}}"
        " -p results {params.folder}"


rule report:
    input:
        [f"{name}.done" for name in STUDY.data],
        expand("{results}/comparison.done", results=STUDY.results),
        expand("{results}/pictures.done", results=STUDY.results),
    output:
        f"{STUDY.folder}/report.html",
    params:
        folder=STUDY.folder,
        shown=" ".join(f"{row}-0" for row in STUDY.settings["shown"]),
    shell:
        "python -m fmfa.report {params.folder} {output} --shown {params.shown}"
