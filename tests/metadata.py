"""A server that answers as the metadata servers of EC2 and Compute Engine do to a spot machine."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Metadata:
    """On a port of this machine until it is closed; once `notice` is set, the machine is to be taken away."""

    def __init__(self) -> None:
        self.notice, self.asked = threading.Event(), 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                given = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
                self.answer("token of this test" if given else None)

            def do_GET(self) -> None:
                outer.asked += 1
                if self.path == "/latest/meta-data/spot/instance-action":
                    known = self.headers["X-aws-ec2-metadata-token"] == "token of this test"
                    self.answer('{"action": "terminate"}' if known and outer.notice.is_set() else None)
                elif (
                    self.path == "/computeMetadata/v1/instance/preempted"
                    and self.headers["Metadata-Flavor"] == "Google"
                ):
                    self.answer("TRUE" if outer.notice.is_set() else "FALSE")
                else:
                    self.answer(None)

            def answer(self, text: str | None) -> None:
                self.send_response(404 if text is None else 200)
                self.end_headers()
                self.wfile.write((text or "").encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
