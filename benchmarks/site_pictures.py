"""Draws four pages of the documentation's site in headless Chromium, quantised to small PNG files.

    make docs && python benchmarks/site_pictures.py --out docs/site_pictures

The pages are served for the moment; the pictures show what fits on a screen and on a phone.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from collections.abc import Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from PIL import Image

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
from browser import open_page

DESKTOP = {"width": 1280, "height": 860, "deviceScaleFactor": 1, "mobile": False}
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
PICTURES = {
    "front": ("index.html", DESKTOP),
    "concepts": ("concepts.html#training-rows", DESKTOP),
    "api": ("api.html", DESKTOP),
    "phone": ("index.html", PHONE),
}
NUM_COLORS = 64
SETTLED_MS = 4000
"""The drafts of the front page are an animation; it is in the middle then."""


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *values: object) -> None:
        pass


def picture(url: str, size: Mapping[str, object]) -> Image.Image:
    """The visible part of a page."""
    with open_page(url) as page:
        page.call("Emulation.setScrollbarsHidden", hidden=True)
        page.call("Emulation.setDeviceMetricsOverride", **size)
        page.run("location.hash && document.querySelector(location.hash).scrollIntoView()")
        page.run(f"new Promise(done => setTimeout(done, {SETTLED_MS}))")
        data = page.call("Page.captureScreenshot", format="png")["data"]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("site", nargs="?", type=Path, default=Path("build/site"))
    parser.add_argument("--out", type=Path, default=Path("docs/site_pictures"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    handler = partial(QuietHandler, directory=str(options.site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for name, (path, size) in PICTURES.items():
            shot = picture(f"http://127.0.0.1:{server.server_port}/{path}", size).convert("RGB")
            shot.quantize(NUM_COLORS).save(options.out / f"{name}.png", optimize=True)
        server.shutdown()


if __name__ == "__main__":
    main()
