"""Draws the page of `opdlm serve` in the middle of a response, in headless Chromium.

    python benchmarks/page_picture.py runs/tiny/model --out docs/serving.png

The response stands still once some tokens are accepted and others drafted; nothing is made up, and the
numbers above are those of the whole response. A process that serves the folder is started and stopped.
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path

from serve_load import ServedProcess

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
from browser import open_page

SIZE = {"width": 760, "height": 480, "deviceScaleFactor": 1.5, "mobile": False}
FREEZE = """
    const shown = Response.prototype.show;
    Response.prototype.show = function (drafts) {
      if (this.frozen) return;
      shown.call(this, drafts);
      this.frozen = this.corrected > 0 && this.final >= 30 && this.turn.querySelectorAll(".draft").length > 3;
    };
    Response.prototype.finish = function () {};
"""
"""The page goes on, and this response stays as it was."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", nargs="?", default="runs/tiny/model")
    parser.add_argument("--prompt", default="story Tusel owl hill")
    parser.add_argument("--out", type=Path, default=Path("docs/serving.png"))
    options = parser.parse_args()
    name = Path(options.folder).resolve().parent.name
    flags = ["--mode", "lossless", "--max-new-tokens", "120", "--name", name]
    server = ServedProcess.start(options.folder, flags)
    try:
        with open_page(f"http://127.0.0.1:{server.port}/") as page:
            page.call("Emulation.setDeviceMetricsOverride", **SIZE)
            page.run(FREEZE)
            page.type(options.prompt)
            page.wait_for("messages.length === 2")
            picture = page.call("Page.captureScreenshot", format="png")["data"]
    finally:
        server.process.terminate()
        server.process.wait(60)
    options.out.write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main()
