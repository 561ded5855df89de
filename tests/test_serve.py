"""The server: its answers, its page in headless Chromium, and who and what it keeps out."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, urlencode, urlsplit

import anyio
import geopandas
import numpy as np
import pandas as pd
import pytest
import uvicorn
from browser import browser
from command_line import run_command
from PIL import Image
from processes import python
from small_project import SIZE
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from geomatch.errors import GeomatchError
from geomatch.query import query
from geomatch.serve import TOKEN
from geomatch.serving import app, decoding, openapi, parameters, uploads
from geomatch.serving.access import COOKIE, AccessControl
from geomatch.serving.uploads import Decoder
from geomatch.serving.work_queue import WorkQueue


class Server:
    """A server, and the project whose tiles it serves."""

    def __init__(self, url, small=None):
        self.url, self.small = url, small
        self.address = urlsplit(url).netloc

    def send(self, path, body=None, method=None, **headers):
        """Status, headers and body of the answer to a request, whose path is sent as it is."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method or ("POST" if body else "GET"), path, body, named)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def json(self, path, body=None, status=200, **parameters):
        """The answer to a request."""
        query = urlencode(parameters, doseq=True)
        found, _, data = self.send(f"{path}?{query}", body)
        assert found == status, data
        return json.loads(data)


@contextlib.contextmanager
def served(project, *options):
    """The program, while it serves a project."""
    # Where tests run in the background of a shell, SIGINT is ignored, also by new processes.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = python(
        *("-m", "geomatch", "serve", "-p", str(project.root), "--port", "0", *options), devices=1
    )
    signal.signal(signal.SIGINT, before)
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://"), process.communicate()
        yield process, url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server(indexed):
    with served(indexed.project) as (_, url):
        yield Server(url, indexed)


def png(pixels):
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, format="PNG")
    return target.getvalue()


@pytest.fixture(scope="module")
def photo(indexed):
    """A PNG without a place."""
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE + 8, SIZE, 3), np.uint8)
    return png(pixels)


def without_footprints(matches):
    return [{k: v for k, v in match.items() if k != "footprint"} for match in matches]


# Answers


def test_a_tile_is_answered_as_by_the_command(server):
    tile = server.small.tiles.ids()[3]
    found = server.json("/query", tile=tile, top=4, verify=2)
    asked = query(server.small.project, tile, top=4, verify=2)
    assert without_footprints(found["matches"]) == asked.as_json()
    assert (found["query"], found["tile"]) == (tile, tile)
    (west, south), _, (east, north) = found["footprint"][:3]
    lon, lat = (np.mean(side) for side in ((west, east), (south, north)))
    there = server.json("/query", lon=lon, lat=lat, from_year=found["year"], top=4)
    assert there["tile"] == tile
    assert there["footprint"] == found["footprint"]


@pytest.mark.parametrize("options", [{}, {"from_year": "2010", "rotate": 90, "top": 3}])
def test_an_image_is_answered_as_by_the_command(server, photo, tmp_path, options):
    (tmp_path / "photo.png").write_bytes(photo)
    sheet = server.small.imagery / "test_2010.tif"
    for path in (tmp_path / "photo.png", sheet):
        found = server.json("/query", path.read_bytes(), name=path.name, **options)
        asked = query(server.small.project, str(path), **options).as_json()
        for match, wanted in zip(without_footprints(found["matches"]), asked, strict=True):
            assert match.pop("query") == path.name
            for name in ("score", "probability"):
                assert match.pop(name) == pytest.approx(wanted.pop(name), abs=1e-5)
            assert match.items() <= wanted.items()
        assert path.name in found["remarks"][0]
        assert "vsimem" not in str(found)
        assert found["picture"].startswith("data:image/jpeg;base64,")
        assert (found["footprint"] is None) == (path != sheet)


def test_a_scan_is_answered_as_by_the_command(server):
    sheet = server.small.imagery / "test_2010.tif"
    scan = sheet.read_bytes()
    found = server.json("/query", scan, name="scan.tif", gsd=1, top=2, year="2010")
    wanted = query(server.small.project, str(sheet), scales=(1.0,), top=2, years=("2010",))
    for match, each in zip(without_footprints(found["matches"]), wanted.as_json(), strict=True):
        assert match.pop("score") == pytest.approx(each.pop("score"), abs=1e-5)
        for name, error in (("confidence", 1e-3), ("lon", 1e-9), ("lat", 1e-9)):
            assert match.pop(name) == pytest.approx(each.pop(name), abs=error)
        assert match | {"query": each["query"]} == each
    # The footprint is that of the scan, not of a tile.
    assert np.ptp(found["matches"][0]["footprint"], axis=0)[1] * 111_000 > 3 * SIZE
    assert server.send("/query?gsd=1&format=gpkg", scan)[2].startswith(b"SQLite")
    for asked, text in (({"rotate": 5}, "too many"), ({"verify": 1}, "not for scans")):
        assert text in server.json("/query", scan, 400, gsd=1, **asked)["error"]
    assert "no parameter gsd" in server.json("/query", status=400, gsd=1, tile="a")["error"]


def test_filters_and_feedback(server):
    tile = server.small.tiles.ids()[0]
    (first, second, *_) = server.json("/query", tile=tile, same_year="true")["matches"]
    left = server.json("/query", tile=tile, same_year="true", unlike=first["tile"])["matches"]
    assert first["tile"] not in [match["tile"] for match in left]
    west, south = first["lon"] - 1e-5, first["lat"] - 1e-5
    box = f"{west},{south},{west + 2e-5},{south + 2e-5}"
    inside = server.json("/query", tile=tile, same_year="true", bbox=box)["matches"]
    assert {match["lon"] for match in inside} == {first["lon"]}
    years = server.json("/query", tile=tile, year=["2010", "2020"], top=50)["matches"]
    assert {match["year"] for match in years} == {"2010", "2020"}
    assert second["tile"] in {match["tile"] for match in years}


def test_answers_are_saved(server, photo, tmp_path):
    tile = server.small.tiles.ids()[5]
    wanted = [match["tile"] for match in server.json("/query", tile=tile, top=3)["matches"]]
    for form in ("gpkg", "geojson", "csv"):
        status, headers, data = server.send(f"/query?tile={tile}&top=3&format={form}")
        assert status == 200
        assert headers["Content-Disposition"] == f'attachment; filename="answers.{form}"'
        (tmp_path / f"answers.{form}").write_bytes(data)
    assert list(pd.read_csv(tmp_path / "answers.csv")["tile"]) == wanted
    assert list(geopandas.read_file(tmp_path / "answers.gpkg", layer="answers")["tile"]) == wanted
    assert len(geopandas.read_file(tmp_path / "answers.geojson")) == 2 * 3 + 1
    assert server.send("/query?format=gpkg&name=a.png", photo)[2].startswith(b"SQLite")


def test_tiles(server):
    project, ids = server.json("/project"), server.small.tiles.ids()
    assert (project["tiles"], project["years"]) == (len(ids), ["2010", "2020"])
    west, south, east, north = project["bbox"]
    box = f"{west},{south},{east},{north}"
    every = server.json("/tiles", bbox=box, year="2010")
    assert every["total"] == len(every["tiles"]) == len(ids) / 2
    some = server.json("/tiles", bbox=box, limit=10)
    assert some["total"] == len(ids) / 2
    assert 5 <= len(some["tiles"]) <= 10
    assert {tile["year"] for tile in some["tiles"]} == {"2020"}
    place, _, year = ids[7].partition("@")
    found = server.json(f"/tiles/{quote(ids[7])}")
    other = {"2010": "2020", "2020": "2010"}[year]
    assert found["others"] == [f"{place}@{other}"]
    named = server.json("/tiles", search=place.upper(), year=year)["tiles"]
    assert ids[7] in [tile["id"] for tile in named]
    status, headers, data = server.send(f"/thumbnail/{quote(ids[7])}?side=64")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(data)).size == (64, 64)


def test_twenty_at_once_are_answered_as_one_by_one(server, photo):
    ids = server.small.tiles.ids()

    def ask(i):
        if i % 4 == 0:
            return server.json("/query", photo, name=f"{i}.png", top=1 + i)
        return server.json("/query", tile=ids[i], top=1 + i, verify=i % 2)

    wanted = [ask(i) for i in range(20)]
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask, range(20))) == wanted


def test_the_api_is_described(server):
    described = server.json("/openapi.json")
    assert described == json.loads(json.dumps(openapi.described()))
    routes = app.App(None, None, None).routes()
    paths = {route.path.replace(":path", "") for route in routes}
    assert set(described["paths"]) == paths - {"/", "/static/{name}", "/openapi.json"}
    tile = server.small.tiles.ids()[0]
    schemas = described["components"]["schemas"]
    for found, name in (
        (server.json("/query", tile=tile, rotate=90, verify=1), "Answer"),
        (server.json("/tiles", limit=1), "Tiles"),
        (server.json("/tiles", limit=1)["tiles"][0], "Tile"),
        (server.json(f"/tiles/{tile}"), "TileDetails"),
        (server.json("/query", tile=tile, verify=1)["matches"][0], "Match"),
        (server.json("/query", status=400), "Error"),
    ):
        assert set(schemas[name]["required"]) <= set(found) <= set(schemas[name]["properties"])
    given = {each["name"] for each in described["paths"]["/query"]["get"]["parameters"]}
    assert given == {each.name for each in (*parameters.TARGET, *parameters.ASKED)}


# What is kept out


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/query", 400, "what is asked for"),
        ("/query?tile=geomatch.toml", 404, "no tile"),
        ("/query?tile=../project/geomatch.toml", 404, "no tile"),
        ("/query?tile=%2Fetc%2Fpasswd", 404, "no tile"),
        ("/query?tile=0,0,1,1", 404, "no tile"),
        ("/query?tile=/tmp/*", 404, "no tile"),
        ("/query?tile=x%00y", 404, "no tile"),
        ("/thumbnail/../../../etc/passwd", 404, "no tile"),
        ("/thumbnail/..%2F..%2Fgeomatch.toml", 404, "no tile"),
        ("/tiles/%2e%2e/geomatch.toml", 404, "no tile"),
        ("/static/../app.py", 404, "Not Found"),
        ("/static/page.html/../../app.py", 404, "Not Found"),
        ("/query?lon=2&lat=95", 400, "lat=95"),
        ("/query?lon=nan&lat=0", 400, "lon=nan"),
        ("/query?lon=100&lat=0", 422, "no tile covers"),
        ("/query?tile=a&lon=1&lat=2", 400, "what is asked for"),
        ("/query?tile=a&top=0", 400, "top=0"),
        ("/query?tile=a&top=1000000", 400, "top=1000000"),
        ("/query?tile=a&top=1&top=2", 400, "twice"),
        ("/query?tile=a&within=/etc/passwd", 400, "no parameter within"),
        ("/query?tile=a&gpkg=/tmp/x", 400, "no parameter gpkg"),
        ("/query?tile=a&yaer=2010", 400, "no parameter yaer"),
        ("/query?tile=a&bbox=1,2,3", 400, "no box"),
        ("/query?tile=a&bbox=nan,0,1,1", 400, "no box"),
        ("/query?tile=a&split=all", 400, "split=all"),
        ("/tiles?year=1999", 400, "no year 1999"),
        ("/tiles?bbox=5,50,4,91", 400, "is no box"),
        ("/tiles?limit=100000", 400, "limit=100000"),
    ],
)
def test_a_question_that_makes_no_sense(server, path, status, text):
    found, _, data = server.send(path)
    assert found == status
    assert text in json.loads(data)["error"]


def bomb(width, height):
    """A PNG whose header promises any number of pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


VRT = b"""<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1">
<SimpleSource><SourceFilename>%s</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"""


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"not an image", "is not an image"),
        (VRT % b"/etc/passwd", "is not an image"),
        (VRT % b"/vsicurl/http://127.0.0.1:9/a.tif", "is not an image"),
        (b"\x89PNG\r\n\x1a\n" + VRT % b"/etc/passwd", "is not only an image"),
        (
            b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
            "not an image",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
        (
            b"<GDAL_WMS><Service name='TMS'><ServerUrl>http://a</ServerUrl></Service></GDAL_WMS>",
            "not",
        ),
        (b"PK\x03\x04 an archive", "is not an image"),
        (b"BM" + bytes(40), "cannot be read"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "cannot be read"),
        (b"II*\0" + b"\xff" * 64, "cannot be read"),
        (bomb(60_000, 60_000), "pixel"),
        (bomb(11_000, 11_000), "more than the 100 million"),
        (bomb(64, 64)[:70], "cannot be read"),
    ],
)
def test_files_that_are_refused(server, photo, data, text):
    found = server.json("/query", data, 422, name="<b>evil</b>.png")
    assert text in found["error"]
    assert "vsimem" not in str(found)
    assert server.json("/query", photo, name="a.png")["matches"]


def test_a_truncated_image(server, photo):
    assert "cannot be read" in server.json("/query", photo[: len(photo) // 2], 422)["error"]


def test_an_image_that_is_too_large_to_be_received(server):
    with socket.create_connection(server.address.split(":"), timeout=30) as to:
        head = f"POST /query HTTP/1.1\r\nHost: {server.address}\r\n"
        to.sendall(f"{head}Content-Length: {uploads.MOST_BYTES + 1}\r\n\r\n".encode())
        assert to.recv(100).startswith(b"HTTP/1.1 413")
    with socket.create_connection(server.address.split(":"), timeout=30) as to:
        to.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        part = b"1000000\r\n" + bytes(1 << 24) + b"\r\n"
        with contextlib.suppress(ConnectionError):
            for _ in range(6):
                to.sendall(part)
        assert to.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_in_time(monkeypatch):
    monkeypatch.setattr(app, "RECEIVE_SECONDS", 0.05)
    asked = app.App(None, None, None)

    async def never():
        await anyio.sleep(60)

    scope = {"type": "http", "method": "POST", "headers": [], "query_string": b"", "path": "/query"}

    async def post():
        await asked.query(Request(scope, never))

    with pytest.raises(app.SlowError, match="did not arrive in"):
        anyio.run(post)


def test_a_name_is_no_path(server, photo):
    for name, shown in (
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\a.png", "a.png"),
        ("a\nb\x1b.png", "ab.png"),
        ("", "the image"),
    ):
        assert server.json("/query", photo, name=name, top=1)["query"] == shown


def test_reading_that_takes_too_long_or_dies(indexed, photo, monkeypatch):
    decoder = Decoder(indexed.project.tile_manifest())
    try:
        with monkeypatch.context() as patch:
            patch.setattr(uploads, "SECONDS", 0.0)
            with pytest.raises(GeomatchError, match="within 0 s"):
                decoder.cut(photo, "a.png", None, 1.0)
        assert decoder.cut(photo, "a.png", None, 1.0).pixels.shape == (SIZE, SIZE, 3)
        decoder._process.kill()
        decoder._process.wait()
        assert decoder.cut(photo, "a.png", None, 1.0).pixels.shape == (SIZE, SIZE, 3)
        limits = Path(f"/proc/{decoder._process.pid}/limits")
        if limits.exists():
            text = re.sub(" +", " ", limits.read_text())
            assert "Max file size 0 0 bytes" in text
            assert f"Max address space {decoding.MEMORY} {decoding.MEMORY} bytes" in text
    finally:
        decoder.close()


# Who is kept out


def passes(token, path="/project", method="GET", **headers):
    """Status and headers of the answer that a gate gives."""
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    path, _, asked = path.partition("?")
    named = {"host": "localhost:8000"} | {k.replace("_", "-"): v for k, v in headers.items()}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "query_string": asked.encode(),
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in named.items()],
    }
    anyio.run(AccessControl(PlainTextResponse("let through"), token), scope, receive, send)
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    assert found["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in found["content-security-policy"]
    return sent[0]["status"], found


def test_without_a_token_this_machine_alone():
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:9"):
        assert passes(None, host=host)[0] == 200
    for host in ("evil.example", "127.0.0.1.evil.example:8000", "", "[::1", "localhost@evil:1"):
        assert passes(None, host=host)[0] == 403


def test_pages_of_other_servers_may_not_ask():
    own = "http://localhost:8000"
    assert passes(None, method="POST", origin=own)[0] == 200
    for origin in ("http://evil.example", "null", "http://localhost:3000", "http://[::1"):
        assert passes(None, method="POST", origin=origin)[0] == 403
    assert passes(None, sec_fetch_site="same-origin", sec_fetch_mode="cors")[0] == 200
    assert passes(None, sec_fetch_site="cross-site", sec_fetch_mode="no-cors")[0] == 403
    assert passes(None, path="/", sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200


def test_the_token():
    token = "a-token-of-the-tests"
    assert passes(token, host="gis.example")[0] == 401
    assert passes(token, path="/")[0] == 401
    for wrong in ("wrong", "", f"{token} ", "é"):
        assert passes(token, path=f"/?token={quote(wrong)}")[0] in (401,)
        if wrong.strip() != token:
            assert passes(token, authorization=f"Bearer {wrong}")[0] == 401
            assert passes(token, cookie=f"{COOKIE}={wrong}")[0] == 401
    assert passes(token, authorization=f"Bearer {token}", host="gis.example")[0] == 200
    status, headers = passes(token, path=f"/?token={token}")
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert passes(token, cookie=cookie.split(";")[0])[0] == 200
    assert passes(token, cookie=cookie.split(";")[0], method="POST", origin="http://x")[0] == 403


def test_tokens_that_are_refused(indexed):
    for token in ("", "short", "with spaces and more of it", "ééééééééééééééééé"):
        assert not TOKEN.fullmatch(token)
        done = run_command("serve", "-p", indexed.root, "--token", token)
        assert done.exit_code == 2
        assert "--token" in done.stderr


def test_a_port_in_use(indexed):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_command("serve", "-p", indexed.root, "--port", port)
    assert done.exit_code == 1
    assert f"port {port} of 127.0.0.1: address already in use" in done.stderr
    assert "--port 0" in done.stderr


def test_an_address_that_is_none(indexed):
    done = run_command("serve", "-p", indexed.root, "--host", "no.such.host.invalid")
    assert done.exit_code == 2
    assert "--host" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_quietly_and_needs_a_token_for_others(indexed, number):
    with served(indexed.project, "--host", "0.0.0.0", "-q") as (process, url):
        page, _, token = url.partition("?token=")
        assert TOKEN.fullmatch(token)
        server = Server(page.replace("0.0.0.0", "127.0.0.1"))
        assert server.send("/project")[0] == 401
        assert server.send("/project", Authorization=f"Bearer {token}")[0] == 200
        children = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
        ).stdout.split()
        assert children
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.slow
def test_pixels_that_memory_holds_are_read_and_others_are_not(server):
    large = np.zeros((9_900, 9_900, 3), np.uint8)
    large[::2] = 200
    found = server.json("/query", png(large), name="large.png", top=1)
    assert len(found["matches"]) == 1


# The page


def test_drop_answer_filter_save(server, photo, tmp_path):
    (tmp_path / "dropped.png").write_bytes(photo)
    with browser() as chromium:
        chromium.open(server.url)
        chromium.download_to(tmp_path)
        chromium.until("tiles.size === 44")  # of the newest year
        chromium.drop(tmp_path / "dropped.png", 300, 500)
        chromium.until("document.querySelectorAll('#answers > li').length === 8")
        assert chromium.run("at('asked-name').textContent") == "dropped.png"
        chromium.until("at('asked-picture').naturalWidth === 256")
        chromium.until("[...document.images].every((image) => image.complete)")
        assert chromium.run("document.querySelector('#answers img').naturalWidth") == 384
        assert "centre square" in chromium.run("at('remarks').textContent")
        chromium.run("document.querySelector('#years input[value=\"2010\"]').click()")
        years = "[...document.querySelectorAll('#answers h3')].map((e) => e.textContent.slice(-4))"
        chromium.until(f"{years}.join() === Array(8).fill('2010').join()")
        chromium.run("document.querySelector('[data-format=gpkg]').click()")
        while not (tmp_path / "answers.gpkg").exists():
            chromium.settle()
        assert not chromium.complaints
    saved = geopandas.read_file(tmp_path / "answers.gpkg", layer="answers")
    assert set(saved["year"]) == {"2010"}
    assert set(saved["query"]) == {"dropped.png"}


def test_the_map_by_keyboard_on_a_phone(server):
    with browser() as chromium:
        chromium.open(server.url, 390, 844)
        chromium.until("tiles.size === 44")
        place = "[...tiles.values()][9].outline.getBounds().getCenter()"
        chromium.run(f"void map.setView({place}, 18)")
        chromium.until("document.querySelectorAll('.tile-picture').length > 3")
        chromium.run("at('map').focus()")
        chromium.key("Enter")
        chromium.until("document.querySelectorAll('#answers > li').length === 8")
        assert chromium.run("at('asked-name').textContent").endswith("@2020")
        assert chromium.run("document.querySelectorAll('.rank').length") > 0
        widths = chromium.run("[document.documentElement.scrollWidth, innerWidth]")
        assert widths == [390, 390]
        chromium.run("void setArea(view())")
        chromium.until("!document.body.classList.contains('waiting')")
        chromium.run("at('area').value = 'nowhere', void ask()")
        chromium.until("!at('failure').hidden")
        assert "no box" in chromium.run("at('failure').textContent")
        # All that a pointer reaches, the keyboard does, and what has the focus is seen.
        assert not chromium.run(
            "[...document.querySelectorAll('button, select, input, #map')].filter((e) =>"
            " e.offsetParent && e.tabIndex < 0).length"
        )
        chromium.run("at('top').focus()")
        assert chromium.run("getComputedStyle(at('top')).outlineStyle") == "solid"
        complaints = [each for each in chromium.complaints if "400" not in str(each)]
        assert not complaints


EVIL = "<img src=x onerror=\"document.title='evil'\">"


class Impostor:
    """A service whose every text is HTML."""

    def about(self):
        known = {"tiles": 1, "size": 32, "gsd": None, "bbox": None, "placement": "none"}
        return known | {"name": EVIL, "index": EVIL, "years": [EVIL]}

    def tiles(self, values):
        return {"total": 1, "tiles": [{"id": EVIL, "year": EVIL}]}

    def ask(self, values, options, image):
        return values["tile"], []

    def as_json(self, found, said):
        match = {"rank": 1, "tile": EVIL, "year": EVIL, "score": 1.0}
        match |= {"probability": None, "match": None, "distance_m": None}
        texts = {"query": EVIL, "tile": EVIL, "year": EVIL, "remarks": [EVIL]}
        return texts | {"matches": [match], "footprint": None}

    def thumbnail(self, name, side):
        assert name == EVIL
        return png(np.zeros((8, 8, 3), np.uint8))


@contextlib.contextmanager
def serving(service):
    """A server of another service."""
    queue = WorkQueue()
    built = app.build(service, queue, SimpleNamespace(), None)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(built, log_config=None))
    threads = [
        threading.Thread(target=queue.run),
        threading.Thread(target=server.run, kwargs={"sockets": [listener]}),
    ]
    for thread in threads:
        thread.start()
    try:
        yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}/")
    finally:
        server.should_exit = True
        queue.close()
        for thread in threads:
            thread.join(30)
        listener.close()


def test_names_are_text_never_html():
    with serving(Impostor()) as server, browser() as chromium:
        chromium.open(server.url)
        chromium.until("document.querySelectorAll('#list img').length === 1")
        chromium.run("document.querySelector('#list button').click()")
        chromium.until("document.querySelectorAll('#answers > li').length === 1")
        chromium.until("[...document.images].every((image) => image.complete)")
        assert chromium.run("document.title") == f"{EVIL} – geomatch"
        assert not chromium.run("document.querySelectorAll('[onerror]').length")
        assert chromium.run("at('remarks').textContent") == EVIL
        assert not chromium.complaints


def test_too_many_questions_and_a_bug():
    class Broken(Impostor):
        def about(self):
            raise RuntimeError("a bug")

    with serving(Broken()) as server:
        status, _, data = server.send("/project")
        assert (status, json.loads(data)["error"]) == (500, "unforeseen RuntimeError")
        server.json("/tiles")
