"""Training as users start it: one process, torchrun and accelerate launch, on the CPU."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from launched_training import STEPS, parameters, train_each, write_backbone
from safetensors.torch import load_file
from toy_training import toy_config

import fmfa.train
from fmfa.errors import ConfigError, TrainingError
from fmfa.files import held_folder
from fmfa.records import read_metrics, read_record
from fmfa.simpedes.generate import generate, recipe
from fmfa.systems import TINY_WEIGHTS, build_system, open_training_data
from fmfa.training.checkpoints import find_checkpoint
from fmfa.training.config import METHODS, TrainConfig
from fmfa.training.fit import RANKS, SIZES, build_accelerator
from fmfa.training.loop import TrainingLoop

HERE = Path(__file__).parent
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
ACCELERATE += ("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")
TIME = 300  # seconds; a launcher that hangs fails the test
LAUNCHED = pytest.mark.xdist_group("launched")  # one worker makes `runs`, once


def told(errors):
    """What the processes said last, without the launcher's own summary of it."""
    return errors.split("failed (exitcode")[0][-3000:]


def launch(*command, **environment):
    """Start `python -m ...` in the background; the outputs are texts."""
    settings = {"env": os.environ | {"OMP_NUM_THREADS": "1"} | environment, "text": True}
    return subprocess.Popen([sys.executable, "-m", *command], stdout=-1, stderr=-1, **settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every method trained by one process in `one` and by two in `two`, and a toy by two in `cut` and `whole`.

    Of `cut` one of the two processes is killed at first. All share a few launches, since importing takes longest.
    """
    folder = tmp_path_factory.mktemp("launched")
    killed = launch(*TORCHRUN, str(HERE / "toy_training.py"), str(folder / "cut"), KILL_AT="9 1")
    data = generate(folder / "data", recipe("tiny", train=8, val=2, test=2, images=2), workers=1, progress=False)
    _, errors = killed.communicate(timeout=TIME)
    assert killed.returncode != 0
    assert "SIGKILL" in errors
    assert find_checkpoint(folder / "cut", "last").name == "last-00000008"
    write_backbone(folder)  # before any of the three processes may read it
    process = launch(*TORCHRUN, str(HERE / "launched_training.py"), str(folder), str(data))
    train_each(folder / "one", data)
    _, errors = process.communicate(timeout=TIME)
    assert process.returncode == 0, told(errors)
    return folder


def weights(run):
    return load_file(find_checkpoint(run, "last") / "model.safetensors")


def assert_equal_training(run, expected, start):
    """Weights equal within a thousandth of what each tensor moved."""
    found, single = weights(run), weights(expected)
    furthest = 0.0
    for name, value in single.items():
        moved = float((value - start[name]).abs().max())
        assert float((found[name] - value).abs().max()) <= 2e-3 * moved + 2e-7, name
        furthest = max(furthest, moved)
    assert furthest > 1e-4


@LAUNCHED
@pytest.mark.parametrize("method", METHODS)
def test_torchrun_trains_as_one_process_on_the_joint_batch(method, runs):
    config = TrainConfig(**parameters(method, runs / "data")).resolved()
    start = build_system(config, open_training_data(config)).model.state_dict()
    assert_equal_training(runs / "two" / method, runs / "one" / method, start)
    records = [read_record(runs / count / method) for count in ("one", "two")]
    assert [(record["processes"], record["steps"]) for record in records] == [(1, STEPS), (2, STEPS)]
    single, double = (
        read_metrics(runs / count / method).set_index(["split", "step", "metric"])["value"] for count in ("one", "two")
    )
    assert single.index.equals(double.index)
    compared = [key for key in single.index if key[0] == "gradient" or "loss/" in key[2]]
    assert {key[0] for key in compared} == {"gradient", "train"}
    for key in compared:
        assert double[key] == pytest.approx(single[key], rel=5e-4, abs=1e-7), key


@LAUNCHED
def test_accelerate_launch_trains_as_one_process_and_prints_once(runs):
    given = [text for name, value in parameters("clip", runs / "data").items() for text in ("-p", name, str(value))]
    process = launch(*ACCELERATE, "-m", "fmfa.train", str(runs / "accelerate"), *given)
    lines, errors = process.communicate(timeout=TIME)
    assert process.returncode == 0, told(errors)
    config = TrainConfig(**parameters("clip", runs / "data")).resolved()
    start = build_system(config, open_training_data(config)).model.state_dict()
    assert_equal_training(runs / "accelerate", runs / "one" / "clip", start)
    assert read_record(runs / "accelerate")["processes"] == 2
    shown = lines.splitlines()
    assert shown[0].startswith(f"{config.weights or TINY_WEIGHTS} (")  # what the starting weights gave
    assert [line.split(":")[0] for line in shown[-2:]] == ["epoch 1/1", str(runs / "accelerate")]
    assert len(set(shown)) == len(shown)


@LAUNCHED
def test_a_killed_process_ends_all_and_the_run_resumes_to_the_same_bytes(runs):
    cut, whole = runs / "cut", runs / "whole"
    assert len(read_record(cut)["resumed"]) == 1
    assert [read_record(run)["steps"] for run in (cut, whole)] == [18, 18]
    same = [(find_checkpoint(run, "last") / "model.safetensors").read_bytes() for run in (cut, whole)]
    assert same[0] == same[1]


@pytest.fixture
def unlaunched(monkeypatch):
    for name in (*SIZES, *RANKS, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return monkeypatch


@pytest.mark.parametrize("count", [1, 2])
def test_accelerate_launch_that_starts_one_of_two_processes_is_refused(count, unlaunched, tmp_path, capsys):
    """What the installed accelerate sets on a CPU, where it leaves a second process to mpirun."""
    arguments = ["--cpu", "--num_processes", str(count), "--num_machines", "1", "-m", "fmfa.train"]
    checked, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    _, environment = prepare_simple_launcher_cmd_env(checked)
    for name in set(environment) - set(os.environ):
        unlaunched.setenv(name, environment[name])
    if count == 1:
        assert build_accelerator(toy_config(), tmp_path).num_processes == 1
        return
    with pytest.raises(ConfigError, match=r"several processes and started one.*torchrun --nproc-per-node N"):
        build_accelerator(toy_config(), tmp_path)
    assert fmfa.train.main([str(tmp_path / "run")]) == 2
    assert "torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_launcher_whose_processes_do_not_meet_is_refused(unlaunched, tmp_path):
    unlaunched.setenv("SLURM_STEP_NUM_TASKS", "3")
    with pytest.raises(ConfigError, match=r"3 processes were asked for \(SLURM_STEP_NUM_TASKS=3\).*found 1"):
        build_accelerator(toy_config(), tmp_path)


def test_a_launcher_that_contradicts_the_parameters_is_refused(unlaunched, tmp_path):
    unlaunched.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"asks for bf16, the configuration for fp32; .*-p precision bf16"):
        build_accelerator(toy_config(), tmp_path)
    assert build_accelerator(toy_config(precision="bf16"), tmp_path).mixed_precision == "bf16"
    unlaunched.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ConfigError, match="device is 'cuda', but accelerate launch was told --cpu"):
        build_accelerator(toy_config(device="cuda", precision="bf16"), tmp_path)


def test_more_processes_than_gpus_are_refused(unlaunched, tmp_path):
    unlaunched.setattr(torch.cuda, "is_available", lambda: True)
    unlaunched.setattr(torch.cuda, "device_count", lambda: 2)
    unlaunched.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes on a machine with 2 GPUs"):
        build_accelerator(toy_config(device="auto"), tmp_path)


def test_processes_at_different_steps_are_refused(unlaunched, tmp_path):
    """Machines that do not share the run folder find different checkpoints in it."""
    loop = object.__new__(TrainingLoop)
    loop.accelerator, loop.folder = build_accelerator(toy_config(), tmp_path), tmp_path
    loop.progress = type("Progress", (), {"step": 4})
    loop._agree()
    others = torch.tensor([4, 0])  # another process found no checkpoint
    unlaunched.setattr("fmfa.training.loop.largest", lambda own: torch.maximum(own, others))
    with pytest.raises(TrainingError, match="at steps 0 to 4, this one at 4; the run folder must be one"):
        loop._agree()


def test_the_command_lists_every_parameter_with_help_choices_and_default(capsys):
    assert fmfa.train.main(["--help-parameters"]) == 0
    *lines, paths = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [setting.name for setting in fields(TrainConfig)]
    assert paths.startswith("# A relative path that you give starts where you are")
    assert "precision: str = 'fp32'  # of the forward pass; one of 'fp32', 'bf16', 'fp16'" in lines


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["-p", "epoch", "3"], "unknown parameter 'epoch'; did you mean epochs?"),
        (["-p", "epochs", "many"], "epochs: should be a valid integer, found 'many'"),
        (["-p", "method", "fmfb"], "did you mean fmfa?"),
        (["-f", "missing.yml"], "cannot read parameters from missing.yml"),
    ],
)
def test_bad_parameters_are_refused_by_one_process_before_anything_is_written(
    given, message, unlaunched, tmp_path, capsys
):
    folder = tmp_path / "run"
    assert fmfa.train.main([str(folder), *given]) == 2
    assert message in capsys.readouterr().err
    unlaunched.setenv("RANK", "1")
    assert fmfa.train.main([str(folder), *given]) == 2
    assert capsys.readouterr().err == ""
    assert not folder.exists()


def test_a_run_folder_that_cannot_be_made_is_a_bad_parameter(unlaunched, tiny, tmp_path, capsys):
    (tmp_path / "file").touch()
    given = ["-p", "root", str(tiny.images.parent), "-p", "device", "cpu"]
    for method in ("clip", "ivt"):
        assert fmfa.train.main([str(tmp_path / "file" / "run"), "-p", "method", method, *given]) == 2
        assert capsys.readouterr().err.startswith(f"error: the run folder {tmp_path / 'file' / 'run'} cannot be made")


def test_a_refused_launch_has_no_traceback_of_ours_and_the_run_stays_as_it_is(tiny, tmp_path):
    words = ("-p", "root", str(tiny.images.parent), "-p", "device", "cpu", "-p", "method", "ivt")
    with held_folder(tmp_path):
        before = sorted(tmp_path.iterdir())
        process = launch(*TORCHRUN, "-m", "fmfa.train", str(tmp_path), *words)
        _, errors = process.communicate(timeout=TIME)
        assert sorted(tmp_path.iterdir()) == before
    assert process.returncode != 0
    assert f"error: {tmp_path} is in use by process {os.getpid()}" in errors
    assert "fmfa/train.py" not in errors
    assert "gloo" not in errors


def test_errors_of_a_training_say_which_process_had_them(unlaunched, tmp_path, capsys):
    given = ["-p", "dataset", "CUHK-PEDES", "-p", "root", str(tmp_path)]
    assert fmfa.train.main([str(tmp_path / "run"), *given]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    unlaunched.setenv("TQDM_DISABLE", "1")  # kept by monkeypatch for the tests after this one
    unlaunched.setenv("RANK", "1")
    assert fmfa.train.main([str(tmp_path / "run"), *given]) == 1
    assert capsys.readouterr().err.startswith("process 1: error: ")
