"""A real headless Chromium that opens a page from loopback and says what it saw."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from html import unescape
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0",
    "--virtual-time-budget=4000", "--dump-dom",
)  # fmt: skip
_WRAPPER = """<!DOCTYPE html><body style="margin:0">
<iframe id="page" src="PAGE" style="border:0;width:WIDTHpx;height:900px"></iframe><pre id="found"></pre><script>
document.getElementById('page').addEventListener('load', event => {
  const frame = event.target.contentWindow, page = frame.document;
  document.getElementById('found').textContent = JSON.stringify({
    title: page.title,
    width: page.documentElement.scrollWidth,
    height: page.documentElement.scrollHeight,
    paper: frame.getComputedStyle(page.body).backgroundColor,
    tags: [...new Set([...page.querySelectorAll('*')].map(item => item.localName))],
    text: page.body.innerText,
    small: [...page.querySelectorAll('svg text')].filter(item => item.getBoundingClientRect().height < 10).length,
  });
});
</script>"""


def chromium() -> str:
    """Return the path of a Chromium; skip the test, saying how to get one, where there is none."""
    named = os.environ.get("DRAFTCACHE_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium, or name one in DRAFTCACHE_CHROMIUM")
    return found


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *arguments: Any, asked: list[str], **more: Any) -> None:
        self.asked = asked
        super().__init__(*arguments, **more)

    def log_message(self, *_: object) -> None:
        """Note the path that was asked for; print nothing."""
        if self.path not in ("/favicon.ico", *self.asked):  # which is the frame's, not the page's
            self.asked.append(self.path)


def look_at(
    page: Path, profile: Path, *, width: int = 390, dark: bool = False
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Open a page in a frame of this width.

    Return what the frame looks like, the lines of the console, and the paths that were asked for.
    """
    asked: list[str] = []
    wrapper = page.with_name(f"frame-of-{page.name}")
    wrapper.write_text(_WRAPPER.replace("PAGE", page.name).replace("WIDTH", str(width)), encoding="utf-8")
    handler = functools.partial(_Handler, asked=asked, directory=str(page.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
        try:
            result = subprocess.run(
                [
                    chromium(), *_FLAGS, *scheme, f"--user-data-dir={profile}", "--window-size=1300,1000",
                    f"http://127.0.0.1:{server.server_address[1]}/{wrapper.name}",
                ],
                capture_output=True, text=True, timeout=60, check=True,
            )  # fmt: skip
        finally:
            server.shutdown()
            thread.join()
    found = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, re.DOTALL)
    assert found is not None
    assert found[1], result.stderr
    console = [line for line in result.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(unescape(found[1])), console, asked
