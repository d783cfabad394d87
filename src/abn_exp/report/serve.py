"""Serve report.html of a folder on this machine's loopback address; the page reloads when the file changes."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RELOAD = b"""<script>
(async function poll(version) {
  try {
    const now = await (await fetch('/version', {cache: 'no-store'})).text();
    if (version !== null && now !== version) location.reload();
    version = now;
  } catch (error) { /* the server has ended */ }
  setTimeout(poll, 2000, version);
})(null);
</script>
"""


class _Handler(BaseHTTPRequestHandler):
    """GET / is the page with a script that polls GET /version, the file's time of change."""

    def __init__(self, page: Path, refresh: Callable[[], None], *arguments: object) -> None:
        self.page, self.refresh = page, refresh
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        if self.path not in ("/", "/version"):
            return self.send_error(404)
        self.refresh()
        kind = "text/plain" if self.path == "/version" else "text/html; charset=utf-8"
        try:
            version = str(self.page.stat().st_mtime_ns).encode()
            body = version if self.path == "/version" else self.page.read_bytes()
        except FileNotFoundError:
            body = b"0" if self.path == "/version" else b"<body>No run has ended yet.</body>"
        body = body.replace(b"</body>", RELOAD + b"</body>")
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # a tab that was closed
            self.wfile.write(body)
        return None

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing for a request."""


def serve(page: Path, refresh: Callable[[], None], port: int = 0) -> ThreadingHTTPServer:
    """Return a server of `page` on 127.0.0.1; `refresh` is called before each answer and may write the page again.

    Port 0 takes a free one (`server_address[1]`). The caller runs `serve_forever`. Raises OSError where the port is
    taken.
    """
    return ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, page, refresh))
