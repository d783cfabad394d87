"""The page while runs go on: served to this machine, with a word when it changes."""

import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from abn_exp.report.serve import serve


def test_the_server_shows_the_page_and_says_when_it_changes(tmp_path: Path) -> None:
    page, refreshed = tmp_path / "report.html", []
    server = serve(page, lambda: refreshed.append(1))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def get(path: str) -> bytes:
        return urllib.request.urlopen(address + path, timeout=10).read()

    try:
        assert b"No run has ended yet" in get("/")
        page.write_text("<body><p>four seeds</p></body>")
        before = get("/version")
        assert b"four seeds" in get("/")
        assert b"fetch('/version'" in get("/")
        os.utime(page, (1, 1))
        assert get("/version") != before
        with pytest.raises(urllib.error.HTTPError):
            get("/../report.html")
    finally:
        server.shutdown()
        server.server_close()
    assert refreshed
