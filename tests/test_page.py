import asyncio
import csv
import io
import json
import os
import queue
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fmfa.errors import ConfigError
from fmfa.gallery import build_gallery, condition, open_gallery
from fmfa.page import serve
from fmfa.systems import load_system

CHROMIUM = "/usr/bin/chromium"
EVIL = "<img src=x onerror=document.title='executed'>"


@pytest.fixture(scope="module")
def system():
    return load_system()


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, system):
    """24 pictures, one colour each, whose names and notes try to be HTML, formulas and SQL."""
    folder = tmp_path_factory.mktemp("page")
    rows = []
    for number in range(24):
        name = f"{EVIL.replace('/', '')}{number}.png" if number % 2 else f"{number}.png"
        colour = np.array([(200, 30, 30), (30, 30, 200), (30, 160, 30), (240, 240, 240)][number % 4], np.uint8)
        Image.fromarray(np.tile(colour + np.uint8(number), (96, 32, 1))).save(folder / name)
        rows.append({"path": name, "camera": ["a'; DROP TABLE pictures; --", EVIL][number % 2], "floor": number % 3,
                     "note": "=cmd|' /C calc'!A0", "name": "Ann"})  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    described = {"source": "", "model": {}}
    build_gallery(folder / "g", str(folder / "table.csv"), system, described, progress=False)
    (folder / "secret.txt").write_text("secret")
    return open_gallery(folder / "g")


def served(gallery, system, host="127.0.0.1"):
    """The address of a server in a thread of its own."""
    found = queue.Queue()

    async def run():
        found.put(serve(gallery, system, host, 0))
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
    return found.get(timeout=20)


@pytest.fixture(scope="module")
def address(gallery, system):
    return served(gallery, system)


def ask(address, path="", opener=urllib.request.urlopen, host=None, **words):
    query = "?" + urllib.parse.urlencode(words) if words else ""
    request = urllib.request.Request(address + path + query, headers={"Host": host} if host else {})
    try:
        with opener(request) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_hits_are_those_of_the_gallery(address, gallery, system):
    status, _, body = ask(address, "hits", query="a person in red", k=5)
    assert status == 200
    hits = json.loads(body)["hits"]
    assert [hit["cosine"] for hit in hits] == sorted((hit["cosine"] for hit in hits), reverse=True)
    assert len(hits) == 5
    like = json.loads(ask(address, "hits", like=hits[2]["vector"], k=1)[2])["hits"]
    assert like[0]["vector"] == hits[2]["vector"]
    assert {hit["own"]["name"] for hit in hits} == {"Ann"}
    assert {hit["name"] for hit in hits} <= {Path(path).name for path in gallery.rows()["path"]}
    chosen = {"f.camera": json.dumps(EVIL), "f.floor": "2", "where": "floor > 1"}
    filtered = json.loads(ask(address, "hits", query="red", k=100, **chosen)[2])["hits"]
    assert {hit["vector"] for hit in filtered} == set(gallery.rows("vector % 2 = 1 AND floor = 2")["vector"])
    about = json.loads(ask(address, "about")[2])
    assert about["pictures"] == 24
    assert [text for _, text in about["filters"]["floor"]] == ["0", "1", "2"]


def test_pictures_are_drawn_anew_and_of_the_gallery_only(address, gallery, tmp_path):
    status, headers, body = ask(address, "picture/0")
    assert (status, headers["Content-Type"], headers["X-Content-Type-Options"]) == (200, "image/jpeg", "nosniff")
    assert Image.open(io.BytesIO(body)).size == (32, 96)
    status, headers, body = ask(address, "looked/0", query="red coat")
    assert (status, headers["Content-Type"]) == (200, "image/png")
    Image.open(io.BytesIO(body)).load()
    odd = ["24", "999999999999999", "../secret.txt", "..%2f..%2fsecret.txt", "/etc/passwd", "0%00", "-1"]
    for path in [*(f"picture/{name}" for name in odd), "secret.txt", "static/x", "gallery.sqlite"]:
        status, _, body = ask(address, path)
        assert status == 404, path
        assert b"secret" not in body
    place = Path(gallery.rows("vector = 2")["path"].item())
    kept = place.read_bytes()
    try:  # a file that is no picture any more
        place.write_text("secret")
        status, _, body = ask(address, "picture/2")
        assert status == 400
        assert body.count(b"secret") == 0
    finally:
        place.write_bytes(kept)


@pytest.mark.parametrize(
    ("words", "told"),
    [({"query": ""}, "describe a person"), ({"where": "camera ="}, "not valid"), ({"k": "x"}, "k must"),
     ({"f.camera": "[1]"}, "text or a number"), ({"f.x": "1"}, "no such column"),
     ({"where": "1); DELETE FROM pictures; --"}, "not valid")],
)  # fmt: skip
def test_a_mistake_is_an_error_in_words(address, gallery, words, told):
    status, _, body = ask(address, "hits", **({"query": "red"} | words))
    assert status == 400
    assert re.search(told, json.loads(body)["error"])
    assert len(gallery) == 24


def test_a_condition_may_not_take_for_ever(gallery, system, monkeypatch):
    monkeypatch.setattr("fmfa.gallery.PATIENCE", 0.2)
    endless = "(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n) > 0"
    with pytest.raises(ConfigError, match="interrupted"):
        gallery.rows(endless)


def test_the_exported_table_holds_no_formulas(address):
    _, headers, body = ask(address, "hits.csv", query="red", k=7)
    assert headers["Content-Disposition"] == 'attachment; filename="hits.csv"'
    rows = list(csv.DictReader(io.StringIO(body.decode())))
    assert [row["rank"] for row in rows] == list("1234567")
    assert not any(cell[:1] in "=+@-" for row in rows for cell in (row["note"], row["path"], row["camera"]))


def test_scripts_of_others_cannot_run(address):
    _, headers, body = ask(address)
    (nonce,) = set(re.findall(rb'nonce="([^"]+)"', body))
    policy = headers["Content-Security-Policy"]
    assert f"script-src 'nonce-{nonce.decode()}'" in policy
    assert "default-src 'none'" in policy
    assert nonce not in ask(address)[2]  # drawn for each page
    assert b"innerHTML" not in body


def test_strangers_are_refused(address, gallery, system):
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
        assert ask(address, "hits", host=host, query="red")[0] == 403
    assert ask(address, "about", host="localhost:1")[0] == 200
    open_to_all = served(gallery, system, "0.0.0.0")
    bare, token = open_to_all.replace("0.0.0.0", "127.0.0.1").split("?token=")
    assert len(token) > 30
    for path in (
        "",
        "about",
        "picture/0",
        "hits.csv?query=red",
        "looked/0?query=red",
        "?token=",
        f"?token={token[:-1]}",
    ):
        assert ask(bare, path)[0] == 403, path
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor()).open
    status, _, page = ask(bare, opener=opener, token=token)
    assert (status, b"<h1" in page) == (200, True)
    assert ask(bare, "picture/0", opener)[0] == 200


def test_filters_are_quoted():
    assert condition({'a"b': "it's"}, "x > 1") == """(x > 1) AND pictures."a""b" = 'it''s'"""
    with pytest.raises(ConfigError, match="text or a number"):
        condition({"a": None})


def wait(page, expression):
    """Until JavaScript is true; Playwright's own way is refused by the page's policy."""
    for _ in range(300):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(100)
    raise AssertionError(expression)


@pytest.mark.skipif(not os.path.exists(CHROMIUM), reason=f"no Chromium at {CHROMIUM}")
def test_in_a_browser(address, gallery, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto(address)
        pictures = "[...document.querySelectorAll('#hits img')].map(image => image.alt)"
        page.keyboard.type("a person in red")  # the box has the focus
        wait(page, "document.querySelector('#hits img')?.naturalWidth")
        red = page.evaluate(pictures)
        assert len(red) == 20
        page.keyboard.press("Control+A")
        page.keyboard.type("blue")
        wait(page, f"String({pictures}) !== {json.dumps(','.join(red))}")
        page.get_by_label("floor").select_option("2")
        wait(page, "document.querySelectorAll('#hits li').length === 8")
        page.get_by_label("Condition (SQL)").fill("vector < 12")
        wait(page, "document.querySelectorAll('#hits li').length === 4")
        look = page.get_by_role("button", name=re.compile("looks in hit 2,"))
        look.focus()
        page.keyboard.press("Enter")
        wait(page, "document.querySelectorAll('#hits img')[1].src.includes('looked/')")
        assert look.get_attribute("aria-pressed") == "true"
        with page.expect_download() as download:
            page.get_by_role("link", name="Export").click()
        assert len(pd.read_csv(download.value.path())) == 4
        third = page.evaluate("document.querySelectorAll('#hits img')[2].src")
        page.get_by_role("button", name=re.compile("More like hit 3,")).click()
        wait(page, "document.activeElement.id === 'heading'")
        assert page.evaluate("document.querySelectorAll('#hits img')[0].src") == third
        assert "more like" in page.get_by_role("status").inner_text()
        assert page.evaluate("[...document.querySelectorAll('img')].every(image => image.alt)")
        assert page.evaluate("[...document.querySelectorAll('input, select')].every(each => each.labels.length)")
        assert page.evaluate("document.querySelectorAll('#hits dd img, #hits dd script').length") == 0
        assert EVIL in page.inner_text("#hits")
        assert "executed" not in page.title()
        page.get_by_label("Condition (SQL)").fill("vector <")
        page.wait_for_selector(".error")
        browser.close()
    assert [fault for fault in faults if "400" not in fault] == []
