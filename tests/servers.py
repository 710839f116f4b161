"""Local servers of shards: http with Range and faults on demand, and the calls of gs that reading makes."""

import contextlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


class Server(ThreadingHTTPServer):
    """Serves `files` (path -> bytes); `faults` answer one request for a shard each, in its place."""

    daemon_threads = True

    def __init__(self, handler=None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.files: dict[str, bytes] = {}
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
    """An object's metadata, and its bytes, as the JSON API of Google Cloud Storage gives them."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        found = re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", path)
        content = self.server.files.get(f"/{found[1]}/{found[2]}") if found else None
        if content is None or "media" in parse_qs(url.query).get("alt", []):
            return self.answer(content)
        about = {"kind": "storage#object", "bucket": found[1], "name": found[2], "size": str(len(content))}
        about |= {"generation": "1", "metageneration": "1"}
        self.reply(200, json.dumps(about).encode(), {"Content-Type": "application/json"})


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
