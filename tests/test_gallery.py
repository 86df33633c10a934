import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fmfa import gallery as galleries
from fmfa.errors import ConfigError
from fmfa.evaluation.evaluate import encode_images, encode_sentence
from fmfa.files import held_folder
from fmfa.gallery import build_gallery, main, open_gallery, refresh_gallery, remove_pictures
from fmfa.nearest import build_codes
from fmfa.search import main as search_main
from fmfa.search import search_gallery
from fmfa.systems import load_system

SHIPPED = {"source": "", "model": {}}


@pytest.fixture(scope="module")
def system():
    return load_system()


@pytest.fixture
def crops(tmp_path):
    folder = tmp_path / "crops"
    folder.mkdir()
    for number in range(30):
        write_picture(folder / f"{number:02d}.png", number)
    return folder


def write_picture(path, seed):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (96, 32, 3), np.uint8)).save(path)


def build(folder, source, system):
    return build_gallery(folder, str(source), system, SHIPPED, progress=False)


def assert_consistent(folder, system):
    """Every row has the vector of its own picture."""
    opened = open_gallery(folder)
    rows = opened.rows()
    assert rows["path"].is_unique
    assert rows["vector"].is_unique
    if len(rows):
        encoded = encode_images(system.model, rows["path"].tolist(), system.transform, progress=False)
        expected = torch.nn.functional.normalize(encoded, dim=1).numpy()
        np.testing.assert_allclose(opened.vectors[rows["vector"]], expected, atol=1e-3)
    return set(rows["path"])


def test_a_search_finds_what_sorting_all_cosines_finds(tmp_path, crops, system):
    build(tmp_path / "g", crops, system)
    opened = open_gallery(tmp_path / "g")
    query = encode_sentence(system.model, "A woman in a red coat.", system.tokenizer)
    vectors = opened.vectors.astype(np.float64)
    cosine = vectors @ (query / query.norm()).double().numpy()
    order = np.argsort(-cosine, kind="stable")[:7]
    hits = opened.search(query, 7)
    assert hits["path"].tolist() == opened.rows()["path"].iloc[order].tolist()
    np.testing.assert_allclose(hits["cosine"], cosine[order], atol=1e-5)
    np.testing.assert_allclose(hits["deviations"], (cosine[order] - cosine.mean()) / cosine.std(ddof=1), atol=2e-2)


def given_gallery(folder, system, vectors, name="table"):
    """A gallery of given vectors, of pictures that are not there, with a column `camera`."""
    table = pd.DataFrame({"path": [f"{name}{n}.png" for n in range(len(vectors))]})
    table["camera"] = [("a", "a", "b")[n % 3] for n in range(len(vectors))]
    table.to_csv(folder / f"{name}.csv", index=False)
    np.save(folder / f"{name}.npy", vectors)
    source, file = str(folder / f"{name}.csv"), str(folder / f"{name}.npy")
    assert build_gallery(folder / "g", source, system, SHIPPED, vectors=file, progress=False) == {}
    return open_gallery(folder / "g")


def clustered(rng, count, size):
    """Vectors as systems make them: off centre, in clusters, with a few large dimensions."""
    spread = 1 / np.arange(1, size + 1)
    people = rng.normal(size=(-(-count // 4), size)).repeat(4, axis=0)[:count]
    return ((people + 0.3 * rng.normal(size=(count, size))) * spread + 0.2).astype(np.float32)


def brute_force(opened, query, k, where=""):
    places = opened.rows(where)["vector"].to_numpy()
    cosine = torch.from_numpy(opened.vectors[places]).double() @ (query / query.norm()).double()
    order = cosine.argsort(descending=True, stable=True)[:k]
    return places[order.numpy()], cosine[order].numpy()


def test_a_search_by_codes_finds_what_brute_force_finds(tmp_path, system, monkeypatch):
    monkeypatch.setattr(galleries, "CODED_ABOVE", 1500)
    monkeypatch.setattr(galleries, "_SAMPLE", 100)
    rng = np.random.default_rng(0)
    size = system.model.encode_image(system.transform.finish(galleries._blank(system))).embedding.shape[1]
    vectors = clustered(rng, 3000, size)
    vectors[1000:1005] = vectors[1000]  # equals
    opened = given_gallery(tmp_path, system, vectors)
    first = opened.search(torch.from_numpy(vectors[7]), 1)["path"].item()
    assert first.endswith("table7.png")
    assert opened.codes.recall >= 0.95
    remove_pictures(tmp_path / "g", [first, *(tmp_path / f"table{n}.png" for n in range(100, 900))])
    opened = given_gallery(tmp_path, system, clustered(rng, 500, size), name="later")  # has no codes yet
    assert (len(opened), len(opened.codes.vector), len(opened.vectors)) == (2699, 3000, 3500)
    for where in ("", "camera == 'b'", "vector < 300"):
        for number in (7, 1000, 500, "drawn"):
            query = torch.from_numpy(rng.normal(size=size) if number == "drawn" else vectors[number]).float()
            for k in (1, 10, 250, 3000):
                hits = opened.search(query, k, where)
                places, cosine = brute_force(opened, query, k, where)
                np.testing.assert_allclose(hits["cosine"], cosine, atol=2e-6)
                if number != "drawn" and k == 10:
                    rows = opened.rows().set_index("vector")["path"]
                    assert hits["path"].tolist() == rows[places].tolist()
    near = [opened.search(torch.from_numpy(v), 10, approximate=True)["path"] for v in vectors[1200:1300]]
    exact = [opened.search(torch.from_numpy(v), 10)["path"] for v in vectors[1200:1300]]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(near, exact, strict=True)]) >= 0.9
    given_gallery(tmp_path, system, clustered(rng, 1200, size), name="last")
    assert len(open_gallery(tmp_path / "g").codes.vector) == 4700
    assert [path.name for path in (tmp_path / "g").glob("codes-*")] == ["codes-4700.npy"]


def test_milvus_without_its_package_is_one_sentence(tmp_path, crops, system, monkeypatch, capsys):
    build(tmp_path / "g", crops, system)
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    assert main(["milvus", str(tmp_path / "g"), "http://localhost:1"]) == 2
    assert "pip install pymilvus" in capsys.readouterr().err
    assert open_gallery(tmp_path / "g").codes is None


def test_milvus_finds_what_exact_search_finds(tmp_path, system):
    pytest.importorskip("pymilvus", reason="pip install pymilvus milvus-lite")
    pytest.importorskip("milvus_lite", reason="pip install pymilvus milvus-lite")
    rng = np.random.default_rng(0)
    size = system.model.encode_image(system.transform.finish(galleries._blank(system))).embedding.shape[1]
    vectors = clustered(rng, 3000, size)
    own = given_gallery(tmp_path, system, vectors)
    assert main(["milvus", str(tmp_path / "g"), str(tmp_path / "lite.db")]) == 0
    served = open_gallery(tmp_path / "g")
    for where in ("", "camera == 'b'", "vector < 900"):
        for query in torch.from_numpy(np.concatenate([vectors[:5], rng.normal(size=(5, size))])).float():
            expected, found = own.search(query, 10, where), served.search(query, 10, where)
            pd.testing.assert_frame_equal(found, expected)
    remove_pictures(tmp_path / "g", [tmp_path / f"table{n}.png" for n in range(2000)])
    changed = given_gallery(tmp_path, system, clustered(rng, 500, size), name="later")
    assert len(changed.codes.vector) == 3500
    query = torch.from_numpy(vectors[7]).float()
    np.testing.assert_allclose(changed.search(query, 300)["cosine"], brute_force(changed, query, 300)[1], atol=2e-6)


@pytest.mark.parametrize("size", [48, 512, 1024])
@pytest.mark.parametrize("kind", ["clustered", "equal", "one large dimension"])
def test_no_cosine_exceeds_the_bound_of_the_first_pass(tmp_path, size, kind):
    rng = np.random.default_rng(size)
    vectors = clustered(rng, 2000, size)
    if kind == "equal":
        vectors[:] = vectors[0]
    if kind == "one large dimension":
        vectors[:, 3] = rng.normal(3, 1, 2000)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    queries = rng.normal(size=(8, size)).astype(np.float32)
    queries[:4] += 10 * vectors[:4]
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    codes = build_codes(tmp_path, vectors, queries)
    for query in queries:
        cosine = vectors.astype(np.float64) @ query
        for places in (None, np.arange(300, 1700)):
            near, bound = codes.near(query, 50, places)
            others = np.setdiff1d(np.arange(2000) if places is None else places, near)
            assert len(set(near)) == 50
            assert cosine[others].max() <= bound


@pytest.mark.parametrize(
    ("vectors", "told"),
    [(np.ones((3, 4), np.float32), r"float32 \[3, 4\]; expected float \[30, "), (np.ones(3, int), "expected float"),
     (None, "cannot be read as .npy")],
)  # fmt: skip
def test_given_vectors_must_fit_the_table(tmp_path, crops, system, vectors, told):
    file = tmp_path / "v.npy"
    file.write_bytes(b"no array") if vectors is None else np.save(file, vectors)
    with pytest.raises(ConfigError, match=told):
        build_gallery(tmp_path / "g", str(crops), system, SHIPPED, vectors=str(file), progress=False)


def test_a_table_keeps_its_columns_and_filters_come_first(tmp_path, crops, system):
    table = pd.DataFrame({"path": [f"crops/{n:02d}.png" for n in range(30)], "camera": ["a", "b", "it's"] * 10})
    table["time"] = [f"2026-05-{n + 1:02d}" for n in range(30)]
    table.to_csv(tmp_path / "table.csv", index=False)
    build(tmp_path / "g", tmp_path / "table.csv", system)
    opened = open_gallery(tmp_path / "g")
    query = torch.randn(opened.vectors.shape[1], generator=torch.Generator().manual_seed(0))
    hits = opened.search(query, 100, "camera == 'b' and time > '2026-05-10'")
    assert sorted(hits["time"]) == [
        t for t, c in zip(table["time"], table["camera"], strict=True) if c == "b" and t > "2026-05-10"
    ]
    table.assign(camera="moved").to_csv(tmp_path / "table.csv", index=False)
    build(tmp_path / "g", tmp_path / "table.csv", system)
    assert set(opened.rows()["camera"]) == {"moved"}
    assert len(opened) == 30


def test_a_data_set_keeps_who_and_where(tmp_path, system, tiny):
    entry = {"root": str(tiny.images.parent), "scale": "tiny", "split": "test"}
    assert build_gallery(tmp_path / "g", "SimPEDES", system, SHIPPED, progress=False, **entry) == {}
    rows = open_gallery(tmp_path / "g").rows()
    assert set(rows["identity"]) == set(tiny.split("test")["identity"])
    assert all(f"_{camera}_" in path for path, camera in zip(rows["path"], rows["camera"], strict=True))
    assert len(open_gallery(tmp_path / "g").choices()["camera"]) > 1
    assert set(rows) == {"vector", "path", "size", "changed", "identity", "camera"}  # and nothing else of the truth


@pytest.mark.parametrize(
    "where",
    ["camera == 1", "1); DROP TABLE pictures; --", "1) UNION SELECT * FROM pictures; DELETE FROM pictures WHERE (1",
     "load_extension('x')", "path IN (SELECT x FROM y)", "'"],
)  # fmt: skip
def test_a_condition_only_reads(tmp_path, crops, system, where):
    build(tmp_path / "g", crops, system)
    with pytest.raises(ConfigError, match=r"not valid: .*columns are vector, path"):
        open_gallery(tmp_path / "g").rows(where)
    assert len(open_gallery(tmp_path / "g")) == 30


def test_add_remove_and_refresh_encode_only_what_changed(tmp_path, crops, system, monkeypatch):
    build(tmp_path / "g", crops, system)
    encoded = []
    original = galleries.encode_images
    monkeypatch.setattr(galleries, "encode_images", lambda m, p, *a, **k: encoded.extend(p) or original(m, p, *a, **k))
    assert build(tmp_path / "g", crops, system) == {}
    assert encoded == []
    write_picture(crops / "03.png", 300)
    write_picture(crops / "new.png", 301)
    (crops / "04.png").unlink()
    (crops / "broken.jpg").write_bytes(b"no picture")
    removed, faults = refresh_gallery(tmp_path / "g", system, progress=False)
    assert {os.path.basename(path) for path in encoded} == {"03.png", "new.png", "broken.jpg"}
    assert removed == 1
    assert [os.path.basename(path) for path in faults] == ["broken.jpg"]
    assert remove_pictures(tmp_path / "g", [crops / "05.png", crops / "unknown.png"]) == 1
    held = assert_consistent(tmp_path / "g", system)
    assert held == {str(p) for p in crops.glob("*.png")} - {str(crops / "05.png")}


def test_another_system_and_a_second_writer_are_refused(tmp_path, crops, system):
    build(tmp_path / "g", crops, system)
    other = load_system()
    with torch.no_grad():
        next(other.model.parameters()).view(-1)[0] += 1
    with pytest.raises(ConfigError, match="another system"):
        build(tmp_path / "g", crops, other)
    record = json.loads((tmp_path / "g" / "gallery.json").read_text())
    (tmp_path / "g" / "gallery.json").write_text(json.dumps(record | {"fingerprint": "0"}))
    with pytest.raises(ConfigError, match="not the system that encoded"):
        open_gallery(tmp_path / "g").system()
    (tmp_path / "g" / "gallery.json").write_text(json.dumps(record))
    script = "import sys; from fmfa.gallery import main; sys.exit(main(sys.argv[1:]))"
    with held_folder(tmp_path / "g"):
        command = [sys.executable, "-c", script, "remove", str(tmp_path / "g"), "x.png"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "in use by process" in done.stderr


def test_a_source_that_is_gone_takes_no_picture_with_it(tmp_path, crops, system):
    build(tmp_path / "g", crops, system)
    crops.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="crops: no such folder or table"):
        refresh_gallery(tmp_path / "g", system, progress=False)
    crops.mkdir()  # as the place of a disk that is not mounted
    with pytest.raises(ConfigError, match="crops holds no picture"):
        refresh_gallery(tmp_path / "g", system, progress=False)
    assert len(open_gallery(tmp_path / "g")) == 30


@pytest.mark.parametrize("source", ["/nowhere", "nowhere.csv", "own.csv", "rank.csv"])
def test_a_wrong_source_leaves_nothing_behind(tmp_path, system, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"file": ["a.png"]}).to_csv("own.csv", index=False)
    pd.DataFrame({"path": ["a.png"], "rank": [1]}).to_csv("rank.csv", index=False)
    with pytest.raises(ConfigError, match=source.removesuffix(".csv")):
        build(tmp_path / "g", source, system)
    assert not (tmp_path / "g").exists()


def test_an_open_gallery_is_searched_while_it_changes(tmp_path, crops, system):
    build(tmp_path / "g", crops, system)
    opened = open_gallery(tmp_path / "g")
    query = encode_sentence(system.model, "A man.", system.tokenizer)
    first = opened.search(query, 1)["path"].item()
    remove_pictures(tmp_path / "g", [first])
    write_picture(crops / "new.png", 500)
    build(tmp_path / "g", crops / "..", system)
    hits = opened.search(query, 100)
    assert set(hits["path"]) == {str(path) for path in crops.glob("*.png")} - {str(crops / "new.png"), first}
    assert str(crops / "new.png") in set(open_gallery(tmp_path / "g").search(query, 100)["path"])


_KILLED = """
import os, signal, sys
from fmfa import gallery
from fmfa.systems import load_system
gallery._BATCH = 3
calls, original, write_json = [], gallery.flush, gallery.write_json
def flush(path):
    calls.append(path)
    if len(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    original(path)
def write(*given):
    write_json(*given)
    if sys.argv[3] == "-1":
        os.kill(os.getpid(), signal.SIGKILL)
gallery.flush, gallery.write_json = flush, write
system = load_system()
print("ready", flush=True)
gallery.build_gallery(sys.argv[1], sys.argv[2], system, {"source": "", "model": {}}, progress=False)
"""


@pytest.mark.parametrize("point", [-1, 1, 2, 9, "random"])
def test_a_killed_build_leaves_a_gallery_that_opens_and_goes_on(tmp_path, crops, system, point):
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "g"), str(crops), str(0 if point == "random" else point)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    child.stdout.readline()
    if point == "random":
        time.sleep(random.uniform(0.05, 0.5))
        child.send_signal(signal.SIGKILL)
    assert child.wait() in (-signal.SIGKILL, 0)
    if (tmp_path / "g" / "gallery.json").exists():
        held = assert_consistent(tmp_path / "g", system)
        assert point == "random" or len(held) == 3 * max(point - 1, 0)
    build(tmp_path / "g", crops, system)
    assert len(assert_consistent(tmp_path / "g", system)) == 30


_KILLED_CODING = """
import os, signal, sys
from fmfa import gallery, nearest
from fmfa.systems import load_system
def write(path, *_):
    open(path, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
nearest.np.lib.format.open_memmap, gallery.CODED_ABOVE = write, 10
gallery.build_gallery(sys.argv[1], sys.argv[2], load_system(), {"source": "", "model": {}}, progress=False)
"""


def test_a_gallery_killed_while_it_is_coded_goes_on(tmp_path, crops, system, monkeypatch):
    child = subprocess.run([sys.executable, "-c", _KILLED_CODING, str(tmp_path / "g"), str(crops)])
    assert child.returncode == -signal.SIGKILL
    assert len(assert_consistent(tmp_path / "g", system)) == 30
    assert open_gallery(tmp_path / "g").codes is None
    monkeypatch.setattr(galleries, "CODED_ABOVE", 10)
    build(tmp_path / "g", crops, system)
    assert len(open_gallery(tmp_path / "g").codes.vector) == 30
    assert list((tmp_path / "g").glob(".codes*")) == []


_KILLED_WRITING = """
import os, signal, sqlite3, sys
table = sqlite3.connect(sys.argv[1])
table.execute("PRAGMA cache_size = 1")
table.execute("BEGIN")
table.execute("UPDATE pictures SET size = -7, path = path || hex(zeroblob(5000))")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["writing", "creating"])
def test_a_table_killed_while_it_is_written_opens_as_it_was(tmp_path, crops, system, moment):
    build(tmp_path / "g", crops, system)
    before = open_gallery(tmp_path / "g").rows()
    table = tmp_path / "g" / "gallery.sqlite"
    if moment == "writing":
        subprocess.run([sys.executable, "-c", _KILLED_WRITING, str(table)])
        assert (tmp_path / "g" / "gallery.sqlite-journal").stat().st_size
        pd.testing.assert_frame_equal(open_gallery(tmp_path / "g").rows(), before)
    else:
        table.write_bytes(b"")
        assert len(open_gallery(tmp_path / "g")) == 0
        build(tmp_path / "g", crops, system)
        assert len(open_gallery(tmp_path / "g")) == 30


def test_half_a_vector_at_the_end_is_overwritten(tmp_path, crops, system):
    build(tmp_path / "g", crops, system)
    with open(tmp_path / "g" / "vectors", "ab") as file:
        file.write(b"xyz")
    write_picture(crops / "new.png", 99)
    build(tmp_path / "g", crops, system)
    assert len(assert_consistent(tmp_path / "g", system)) == 31


@pytest.mark.parametrize("name", ["gallery.json", "gallery.sqlite", "vectors", "codes.npz", "codes-30.npy"])
def test_a_damaged_gallery_is_one_sentence(tmp_path, crops, system, name, capsys, monkeypatch):
    monkeypatch.setattr(galleries, "CODED_ABOVE", 20)
    build(tmp_path / "g", crops, system)
    (tmp_path / "g" / name).write_bytes((tmp_path / "g" / name).read_bytes()[:100])
    assert search_main([str(tmp_path / "g"), "a man", "--device", "cpu"]) == 2
    assert name.removesuffix("-30.npy") in capsys.readouterr().err


def test_the_commands(tmp_path, crops, system, capsys):
    assert main(["build", str(crops), "--to", str(tmp_path / "g"), "--device", "cpu"]) == 0
    assert "30 pictures" in capsys.readouterr().out
    assert (
        search_main([str(tmp_path / "g"), "a man", "--like", str(crops / "07.png"), "-k", "2", "--format", "json"]) == 0
    )
    hits = json.loads(capsys.readouterr().out)
    assert [hit["rank"] for hit in hits] == [1, 2, 1, 2]
    assert hits[2]["path"] == str(crops / "07.png")
    (tmp_path / "sentences.txt").write_text("a man\n\na woman in red\n")
    assert search_main([str(tmp_path / "g"), "--file", str(tmp_path / "sentences.txt"), "--format", "csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 21
    opened = open_gallery(tmp_path / "g")
    own = search_gallery(opened, system, [], [str(crops / "11.png")], k=1)
    assert own["cosine"].item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [(["/nowhere", "a man"], "gallery.json"), (["G"], "nothing to search for"), (["G", " "], "sentence"),
     (["G", "a man", "-k", "0"], "-k is 0"), (["G", "--like", "/nowhere.png"], "nowhere"),
     (["G", "--file", "/nowhere"], "nowhere")],
)  # fmt: skip
def test_a_mistake_is_one_sentence(tmp_path, crops, system, capsys, words, told):
    build(tmp_path / "g", crops, system)
    assert search_main([str(tmp_path / "g") if word == "G" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
