"""Local servers of shards and runs: http with Range and faults on demand, s3 by moto, and the calls of gs."""

import contextlib
import json
import logging
import re
import socket
import sys
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes); `faults` answer one request for a shard each, in its place."""

    daemon_threads = True

    def __init__(self, handler=None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.files: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}
        self.times: dict[str, str] = {}
        self.faults: list = []
        self.requests: list[tuple[str, str | None]] = []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, folder: Path, prefix: str = "/") -> None:
        for path in folder.rglob("*.*"):
            if path.is_file():
                self.files[prefix + path.relative_to(folder).as_posix()] = path.read_bytes()

    def handle_error(self, request, client_address) -> None:
        pass  # a connection that a test cuts


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((path, self.headers.get("Range")))
            fault = self.server.faults.pop(0) if self.server.faults and path.endswith(".tar") else None
        if fault:
            fault(self)
        else:
            self.answer(self.server.files.get(path))

    def answer(self, content: bytes | None) -> None:
        if content is None:
            return self.reply(404, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted:
            return self.reply(200, content)
        first, last = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
        if first > last:
            return self.reply(416, b"")
        self.reply(206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


class GoogleHandler(Handler):
    """Objects, their metadata and lists, and uploads in parts, as in the JSON API of Google Cloud Storage."""

    def do_GET(self) -> None:
        url, query = self.asked()
        listed = re.fullmatch(r"/storage/v1/b/([^/]+)/o", url)
        if listed:
            prefix = f"/{listed[1]}/{query.get('prefix', '')}"
            return self.tell(
                {"items": [self.about(name) for name in sorted(self.server.files) if name.startswith(prefix)]}
            )
        name = self.named(url)
        if name not in self.server.files or query.get("alt") == "media":
            return self.answer(self.server.files.get(name))
        self.tell(self.about(name))

    def do_DELETE(self) -> None:
        there = self.server.files.pop(self.named(self.asked()[0]), None)
        self.reply(404 if there is None else 204, b"")

    def do_POST(self) -> None:
        url, query = self.asked()
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        bucket = re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", url)[1]
        upload = urlencode({"upload_id": f"/{bucket}/{query['name']}"})
        self.reply(200, b"{}", {"Location": f"http://{self.headers['Host']}/upload?{upload}"})

    def do_PUT(self) -> None:
        """The next bytes of an upload; only the last ones make it an object."""
        name = self.asked()[1]["upload_id"]
        self.server.parts[name] = self.server.parts.get(name, b"") + self.rfile.read(
            int(self.headers["Content-Length"])
        )
        if self.headers["Content-Range"].endswith("/*"):
            return self.reply(308, b"", {"Range": f"bytes=0-{len(self.server.parts[name]) - 1}"})
        self.server.files[name] = self.server.parts.pop(name)
        self.server.times[name] = datetime.now(UTC).isoformat()
        self.tell(self.about(name))

    def asked(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        return unquote(url.path), dict(parse_qsl(url.query))

    def named(self, path: str) -> str | None:
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", path)
        return f"/{found[1]}/{found[2]}" if found else None

    def about(self, path: str) -> dict[str, str]:
        _, bucket, name = path.split("/", 2)
        time = self.server.times.get(path, "2026-01-01T00:00:00Z")
        about = {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(self.server.files[path]))}
        return about | {"generation": "1", "metageneration": "1", "timeCreated": time, "updated": time}

    def tell(self, tree: dict) -> None:
        self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})


class S3:
    """moto's s3 on a port of this machine. `fault(method, path)` is asked before each answer: None lets it pass, an
    int is the answer's status, "cut" closes the connection, and "short" does so after half of the answer."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self.moto = DomainDispatcherApplication(create_backend_app)
        self.fault = lambda method, path: None
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True, request_handler=MotoRequestHandler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, environ, start_response):
        fault = self.fault(environ["REQUEST_METHOD"], unquote(environ["PATH_INFO"]))
        if isinstance(fault, int):
            start_response(f"{fault} Fault", [("Content-Length", "0")])
            return [b""]
        if fault == "cut":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        body = self.moto(environ, start_response)
        return self.half(body, environ["werkzeug.socket"]) if fault == "short" else body

    @staticmethod
    def half(body, connection):
        content = b"".join(body)
        yield content[: len(content) // 2]
        connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def running(handler=None):
    with Server(handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


if __name__ == "__main__":  # a folder behind the calls of gs: FOLDER PREFIX
    with Server(GoogleHandler) as server:
        server.put(Path(sys.argv[1]), sys.argv[2])
        print(server.server_port, flush=True)
        server.serve_forever()
