"""Files written whole or not at all, and folders that one process holds."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fmfa.errors import ConfigError, TrainingError
from fmfa.files import held_folder, read_json, said_plainly, whole_file

HOLD = """
import sys, time
from fmfa.files import held_folder
with held_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), whole_file(path) as part:  # noqa: PT012
        part.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with whole_file(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"null", "expected a JSON object, found NoneType"),
        (b"[1]", "found list"),
        (b"{", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (None, "cannot be read as JSON"),
    ],
)
def test_json_of_another_kind_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainingError, match=words) as raised:
        read_json(path, TrainingError)
    assert str(path) in str(raised.value)


def test_json_is_read(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"a": 1}))
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_an_oserror_is_said_plainly(tmp_path):
    (tmp_path / "file").write_text("")
    said = r"the folder cannot be made: Not a directory \(.*file/x\)"
    with pytest.raises(ConfigError, match=said), said_plainly("the folder cannot be made"):
        (tmp_path / "file" / "x").mkdir()


def test_a_second_process_is_refused_and_told_whom_it_waits_for(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on "), held_folder(tmp_path):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    deadline = time.monotonic() + 10
    while True:  # the system releases the lock of a killed process by itself
        try:
            with held_folder(tmp_path):
                return
        except ConfigError:
            assert time.monotonic() < deadline
