"""Draws the page of `opdlm serve` in the middle of a response, in headless Chromium.

    python benchmarks/page_picture.py runs/tiny/model --out docs/serving.png

The picture is taken once some tokens are accepted and others drafted; nothing is made up. A process that
serves the folder is started and stopped.
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path

from serve_load import ServedProcess

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
from browser import open_page

PROMPTS = ("add 47 38", "story Tusel owl hill")
SIZE = {"width": 720, "height": 460, "deviceScaleFactor": 1.5, "mobile": False}
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
    parser.add_argument("--out", type=Path, default=Path("docs/serving.png"))
    options = parser.parse_args()
    server = ServedProcess.start(options.folder, ["--mode", "lossless", "--max-new-tokens", "120"])
    try:
        with open_page(f"http://127.0.0.1:{server.port}/") as page:
            page.call("Emulation.setDeviceMetricsOverride", **SIZE)
            for place, prompt in enumerate(PROMPTS):
                if place == len(PROMPTS) - 1:
                    page.run(FREEZE)
                page.run("document.getElementById('text').focus()")
                page.type(prompt)
                page.wait_for("messages.length && !document.getElementById('send').disabled")
            picture = page.call("Page.captureScreenshot", format="png")["data"]
    finally:
        server.process.terminate()
        server.process.wait(60)
    options.out.write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    main()
