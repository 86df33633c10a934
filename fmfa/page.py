"""The page of a gallery: `python -m fmfa.page GALLERY` (or `make search GALLERY=...`) serves it to this machine.

It sends pictures of its gallery, drawn anew from their pixels, and answers searches; it changes nothing. Listening
elsewhere than on this machine, it asks for a token, which the address it prints holds.
"""

import argparse
import hmac
import io
import ipaddress
import json
import secrets
import sys
import warnings
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler

from fmfa.data.images import load_image
from fmfa.errors import ConfigError, FmfaError
from fmfa.evaluation.evaluate import encode_sentence
from fmfa.files import PROJECT
from fmfa.gallery import OWN_COLUMNS, Gallery, build_gallery, condition, open_gallery
from fmfa.plots.alignment import plot_looked
from fmfa.systems import System, load_system

PAGE = Path(__file__).with_suffix(".html")
PORT = 8866
MOST = 200  # hits at once
_SHOWN = 512  # pixels, the longer side of a picture
_COOKIE = "fmfa-token"


def serve(gallery: Gallery, system: System, host: str = "127.0.0.1", port: int = PORT) -> str:
    """Begin to serve the page in the running event loop; returns its address, with a token unless only this machine
    can reach it.

    Args:
        gallery: an open gallery.
        system: the one that encoded it.
        host: address to listen on.
        port: or, if it is taken, any other.

    Raises:
        ConfigError: the address cannot be listened on.
    """  # fmt: skip
    token = "" if _is_loopback(host) else secrets.token_urlsafe()
    shared = {"gallery": gallery, "system": system, "token": token}
    routes = [("/", _Page), ("/about", _About), ("/hits", _Hits), ("/hits.csv", _Export)]
    routes += [(r"/picture/(\d{1,15})", _Picture), (r"/looked/(\d{1,15})", _Looked)]
    application = Application([(path, handler, shared) for path, handler in routes])
    try:
        sockets = bind_sockets(port, host)
    except OSError:
        try:
            sockets = bind_sockets(0, host)
        except OSError as error:
            raise ConfigError(f"{host} cannot be listened on: {error.strerror or error}") from error
    HTTPServer(application).add_sockets(sockets)
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{sockets[0].getsockname()[1]}/" + (f"?token={token}" if token else "")


def demonstration(device: str = "cpu") -> Path:
    """The gallery of SimPEDES' test pictures as the shipped CLIP encodes them, built if it is missing."""
    folder = PROJECT / "runs" / "gallery-simpedes"
    described: dict[str, Any] = {"source": "", "model": {}}
    build_gallery(folder, "SimPEDES", load_system(device=device), described, root="", scale="small", split="test")
    return folder


class _Handler(RequestHandler):
    """Refuses strangers; tells errors of users as JSON."""

    headers_of_all: ClassVar = {
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
        "Cross-Origin-Resource-Policy": "same-origin",
    }

    def initialize(self, gallery: Gallery, system: System, token: str) -> None:
        self.gallery, self.system, self.token = gallery, system, token

    def set_default_headers(self) -> None:
        for name, value in self.headers_of_all.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        if not self.token:  # a name that another site lets point to this machine is no way in
            if not _is_loopback(self.request.host_name.strip("[]")):
                raise HTTPError(403, reason="The page is for this machine only")
        elif not hmac.compare_digest(self.get_cookie(_COOKIE, "").encode(), self.token.encode()):
            if not hmac.compare_digest(self.get_query_argument("token", "").encode(), self.token.encode()):
                raise HTTPError(403, reason="The token is missing; open the address that was printed at the start")
            self.set_cookie(_COOKIE, self.token, httponly=True, samesite="Strict")
            self.redirect("./")

    def write_error(self, status_code: int, **details: Any) -> None:
        error = details["exc_info"][1]
        if isinstance(error, FmfaError):
            self.set_status(400)
        self.finish({"error": str(error) if isinstance(error, FmfaError) else self._reason})

    def log_exception(self, *error: Any) -> None:
        if not isinstance(error[1], FmfaError):
            super().log_exception(*error)

    def hits(self) -> pd.DataFrame:
        """The hits of the request, with `vector`, best first."""
        values = {name[2:]: self.get_query_argument(name) for name in self.request.query_arguments if name[:2] == "f."}
        try:
            k = int(self.get_query_argument("k", "20"))
            chosen = {name: json.loads(value) for name, value in values.items()}
        except ValueError:
            raise ConfigError("k must be a number, and the value of a filter JSON") from None
        where = condition(chosen, self.get_query_argument("where", ""))
        text, like = self.get_query_argument("query", ""), self.get_query_argument("like", "")
        if like:
            query = torch.from_numpy(self.gallery.vectors[self.row(like)["vector"]]).float()
        elif text:
            query = encode_sentence(self.system.model, text, self.system.tokenizer)
        else:
            raise ConfigError("describe a person")
        return self.gallery.search(query, max(1, min(k, MOST)), where)

    def row(self, number: str) -> dict[str, Any]:
        """The row of a picture, by its vector."""
        found = self.gallery.rows(f"vector = {int(number)}" if number.isdecimal() else "0").to_dict("records")
        if not found:
            raise HTTPError(404, reason="No such picture in the gallery")
        return found[0]


class _Page(_Handler):
    def get(self) -> None:
        nonce = secrets.token_urlsafe(16)
        here = "default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
        here += f"style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; form-action 'none'; "
        self.set_header(
            "Content-Security-Policy", here + "frame-ancestors 'self' http://127.0.0.1:* http://localhost:*"
        )
        self.finish(PAGE.read_text(encoding="utf-8").replace("NONCE", nonce))


class _About(_Handler):
    def get(self) -> None:
        filters = {
            name: [[json.dumps(value), str(value)] for value in all] for name, all in self.gallery.choices().items()
        }
        self.finish({"name": self.gallery.folder.name, "pictures": len(self.gallery), "filters": filters})


class _Hits(_Handler):
    def get(self) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            hits = self.hits()
        own = json.loads(hits.drop(columns=[*OWN_COLUMNS, "cosine", "deviations"]).to_json(orient="records"))
        rows = json.loads(hits[["vector", "cosine", "deviations"]].to_json(orient="records"))
        rows = [row | {"name": Path(path).name, "own": of} for row, path, of in zip(rows, hits["path"], own)]
        self.finish({"hits": rows, "notes": [str(warning.message) for warning in told]})


class _Export(_Handler):
    def get(self) -> None:
        hits = self.hits().drop(columns=["vector", "size", "changed"])
        for name in hits.select_dtypes(exclude="number"):  # a spreadsheet would compute what begins so
            hits[name] = [
                f"'{v}" if isinstance(v, str) and v[:1] in ("=", "+", "-", "@", "\t", "\r") else v for v in hits[name]
            ]
        self.set_header("Content-Type", "text/csv; charset=utf-8")
        self.set_header("Content-Disposition", 'attachment; filename="hits.csv"')
        hits.index += 1
        self.finish(hits.to_csv(index_label="rank"))


class _Picture(_Handler):
    def get(self, number: str) -> None:
        picture = load_image(self.row(number)["path"])
        picture.thumbnail((_SHOWN, _SHOWN))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=90)
        self.set_header("Content-Type", "image/jpeg")
        self.finish(file.getvalue())


class _Looked(_Handler):
    def get(self, number: str) -> None:
        file = io.BytesIO()
        plot_looked(self.system, [self.row(number)["path"]], self.get_query_argument("query")).savefig(
            file, format="png"
        )
        self.set_header("Content-Type", "image/png")
        self.finish(file.getvalue())


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main(arguments: list[str] | None = None) -> int:
    """Command line; serves until it is interrupted; returns 2 for a mistake in what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m fmfa.page", description="Serve the page of a gallery.")
    parser.add_argument("gallery", nargs="?", default="", help="empty: one of SimPEDES' test pictures, which is built")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; beyond this machine, with a token")
    parser.add_argument("--port", type=int, default=PORT, help="another one is taken if it is in use")
    parser.add_argument("--weights", default="", help="where the gallery's weights are now, if they were moved")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)

    async def start() -> None:
        print(f"{len(gallery):,} pictures at {serve(gallery, system, options.host, options.port)}", flush=True)

    try:
        gallery = open_gallery(options.gallery or demonstration(options.device))
        system = gallery.system(options.device, options.weights)
        loop = IOLoop.current()
        loop.run_sync(start)
        print("Ctrl+C ends it.", flush=True)
        loop.start()
    except FmfaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
