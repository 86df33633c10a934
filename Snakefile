# The study as a workflow: data -> one training a (row, seed) -> evaluation -> comparison. Every step is a notebook
# executed by the package's runner. `make study`, or: snakemake --cores all --config scale=quick
configfile: "study.yml"

NAME = config.get("scale", "quick")
SCALE = config["scales"][NAME]
OUT = f"runs/{NAME}"
RUNS = [f"{row}-{seed}" for row in SCALE["rows"] for seed in SCALE["seeds"]]
DATA = " ".join(f"-p {name} {value}" for name, value in SCALE["data"].items())
RUN = "OMP_NUM_THREADS={threads} python -m fmfa.runner"


def training(wildcards):
    values = {**SCALE["data"], **SCALE["train"], **config["rows"][wildcards.row], "seed": wildcards.seed}
    return " ".join(f"-p {name} '{value}'" for name, value in values.items())


wildcard_constraints:
    seed=r"\d+",


rule all:
    input:
        f"{OUT}/comparison.ipynb",


rule data:
    input:
        "notebooks/01_data.ipynb",
    output:
        f"{OUT}/data.ipynb",
    threads: 2
    shell:
        f"{RUN} {{input}} {{output}} {DATA}"


rule train:
    input:
        f"{OUT}/data.ipynb",
        notebook="notebooks/02_train.ipynb",
        weights="data/tiny_clip.safetensors",
    output:
        f"{OUT}/{{row}}-{{seed}}/train.ipynb",
    params:
        values=training,
        folder=lambda wildcards: os.path.abspath(f"{OUT}/{wildcards.row}-{wildcards.seed}"),
    shell:
        f"{RUN} {{input.notebook}} {{output}} {{params.values}} -p run {{params.folder}}"


rule evaluate:
    input:
        f"{OUT}/{{row}}-{{seed}}/train.ipynb",
        notebook="notebooks/03_evaluate.ipynb",
    output:
        f"{OUT}/{{row}}-{{seed}}/evaluate.ipynb",
    params:
        folder=lambda wildcards: os.path.abspath(f"{OUT}/{wildcards.row}-{wildcards.seed}"),
    shell:
        f"{RUN} {{input.notebook}} {{output}} {DATA} -p run {{params.folder}}"


rule compare:
    input:
        expand(f"{OUT}/{{run}}/evaluate.ipynb", run=RUNS),
        notebook="notebooks/04_ablation.ipynb",
    output:
        f"{OUT}/comparison.ipynb",
    params:
        folder=os.path.abspath(OUT),
        baseline=SCALE["baseline"],
    shell:
        f"{RUN} {{input.notebook}} {{output}} -p results {{params.folder}} -p baseline {{params.baseline}}"
