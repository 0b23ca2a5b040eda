"""An HTTP proxy before a real server: it forwards all requests but those for which a test has a fault."""

import contextlib
import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, Self
from urllib.parse import urlsplit

Fault = Literal["reset", "lose"] | tuple[int, str] | None
"""A reset before a request is forwarded, or after; a refusal by status and S3 code; or none."""
_HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "date", "server"}


class Proxy(ThreadingHTTPServer):
    """Forwards to a server."""

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target = urlsplit(target).netloc

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def find_fault(self, request: BaseHTTPRequestHandler) -> Fault:
        """Return what happens to a request."""
        raise NotImplementedError

    @contextlib.contextmanager
    def serving(self) -> Iterator[Self]:
        thread = threading.Thread(target=self.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


class _Forward(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.find_fault(self)
        if fault == "reset":
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(fault, tuple):
            status, code = fault
            self.answer(status, {"Content-Type": "application/xml"}, f"<Error><Code>{code}</Code></Error>".encode())
            return
        target = http.client.HTTPConnection(self.server.target)
        target.request(self.command, self.path, body, dict(self.headers))
        answer = target.getresponse()
        if fault == "lose":
            answer.read()
            self.close_connection = True
            self.connection.close()
            return
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS}
        self.answer(answer.status, headers, answer.read(), length=answer.getheader("Content-Length"))
        target.close()

    def answer(self, status: int, headers: dict[str, str], body: bytes, length: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        # A HEAD answer has the length of what GET would send.
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass
