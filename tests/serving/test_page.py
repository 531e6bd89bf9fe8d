"""The page at `/` in a browser: it chats, shows drafts, stops, asks for a key. What its stream carries."""

from __future__ import annotations

import urllib.request
from typing import Any

import pytest
from loopback_server import CHAT, HELLO, Served, serve

from opdlm.decoding.decode_config import DecodeConfig

FINAL = ("accepted", "corrected", "added")
SHOWN = "[...document.querySelectorAll('#turns article')]"
COLLECT_KINDS = """
    window.kinds = new Set();
    new MutationObserver((changes) => {
      for (const change of changes)
        for (const node of change.addedNodes) if (node.localName === "span") kinds.add(node.className);
    }).observe(document.getElementById("turns"), { childList: true, subtree: true });
"""
STOP_AT_FIRST_TOKEN = """
    new MutationObserver((changes, observer) => {
      if (!document.querySelector("#turns span")) return;
      observer.disconnect();
      document.getElementById("stop").click();
    }).observe(document.getElementById("turns"), { childList: true, subtree: true });
"""
IDLE = "!document.getElementById('send').disabled"


def test_the_page_is_one_file_that_loads_nothing(lossless: Served) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{lossless.port}/") as answer:
        page, headers = answer.read().decode(), answer.headers
    assert headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "http://" not in page and "https://" not in page and " src=" not in page


@pytest.fixture(scope="module", params=["lossless", "threshold", "ar"])
def any_mode(folders: Any, request: pytest.FixtureRequest) -> Any:
    yield from serve(folders["preserve"], DecodeConfig(mode=request.param, max_new_tokens=24))


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 5}, {"max_tokens": 3}])
def test_drafts_add_up_to_the_answer(any_mode: Served, settings: dict[str, Any]) -> None:
    """Each state replaces what was not final; a corrected token differs from the draft before it."""
    body = {"messages": HELLO, **settings}
    plain = any_mode.post(CHAT, body)[1]
    options = {"include_drafts": True, "include_usage": True}
    *events, last = any_mode.events(CHAT, body | {"stream_options": options})
    assert last["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"]
    shown: list[dict[str, str]] = []
    num_forwards = 0
    for choice in (event["choices"][0] for event in events):
        if "drafts" not in choice:
            continue
        drafts = choice["drafts"]
        before, now = shown[drafts["offset"] :], drafts["tokens"]
        assert all(token["state"] not in FINAL for token in before)
        for old, new in zip(before, now, strict=False):
            if new["state"] == "corrected":
                assert old["state"] == "draft"
            if new["state"] == "accepted":
                assert old == {"text": new["text"], "state": "draft"}
        shown[drafts["offset"] :] = now
        assert drafts["num_forwards"] > num_forwards
        num_forwards = drafts["num_forwards"]
    final = [token for token in shown if token["state"] in FINAL]
    text = "".join(choice["delta"]["content"] for choice in (event["choices"][0] for event in events))
    assert text == plain["choices"][0]["message"]["content"]
    assert "".join(token["text"] for token in shown[: len(final)]) == text
    assert num_forwards == last["usage"]["num_forwards"]
    states = {token["state"] for token in final}
    assert states <= ({"added"} if any_mode.config.mode == "ar" else {*FINAL})


def test_others_see_nothing_new(lossless: Served) -> None:
    events = lossless.events(CHAT, {"messages": HELLO})
    assert all("drafts" not in event["choices"][0] for event in events)


@pytest.fixture
def page(served_process: Any) -> Any:
    browser = pytest.importorskip("browser", exc_type=ImportError)
    if not browser.CHROMIUM.exists():
        pytest.skip("no chromium here")
    with browser.open_page(served_process.url) as opened:
        yield opened


def test_the_page_chats_with_a_key_and_stops(page: Any) -> None:
    assert page.wait_for("document.getElementById('model').textContent !== 'opdlm serve'")
    page.run("document.getElementById('text').focus()")
    page.type("add 1 2")
    assert "--api-key" in page.wait_for("document.getElementById('problem').textContent")
    page.wait_for(IDLE)
    assert page.run("document.activeElement.id") == "key"
    assert page.run("document.getElementById('text').value") == "add 1 2"
    page.call("Input.insertText", text="secret")
    assert page.run("sessionStorage.getItem('opdlm-api-key')") == "secret"
    page.run(COLLECT_KINDS)
    page.run("document.getElementById('send').click()")
    page.wait_for(f"{SHOWN}.length === 2 && {IDLE}")
    assert {*page.run("[...window.kinds]")} <= {"draft", "accepted", "corrected", "added", "unknown"}
    assert page.run("window.kinds.has('draft')")
    first = page.run(f"{SHOWN}[1].textContent")
    assert first and page.run("document.querySelectorAll('#turns .draft').length") == 0
    assert float(page.run("document.getElementById('per-forward').textContent")) > 0
    assert float(page.run("document.getElementById('per-second').textContent")) > 0
    page.run("document.getElementById('text').focus()")
    page.type("copy ab")
    page.wait_for(f"{SHOWN}.length === 4 && {IDLE}")
    roles = "messages.map((message) => message.role).join()"
    assert page.run(roles) == "user,assistant,user,assistant"
    assert page.run("messages[1].content") == first

    page.run("document.getElementById('text').focus()")
    page.run("document.getElementById('new').click()")
    assert page.run(f"{SHOWN}.length + messages.length") == 0
    page.run(STOP_AT_FIRST_TOKEN)
    page.type("add 1 2")
    page.wait_for(f"messages.length === 2 && {IDLE}")
    stopped = page.run("messages[1].content")
    assert first.startswith(stopped) and len(stopped) < len(first)
    assert not page.run("document.getElementById('problem').textContent")
    assert all("401" in error for error in page.errors), page.errors


def test_the_page_fits_a_phone_and_is_labelled(page: Any) -> None:
    size = {"width": 360, "height": 640, "deviceScaleFactor": 1, "mobile": True}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    assert page.run("document.documentElement.scrollWidth") == 360
    unlabelled = (
        "[...document.querySelectorAll('input, textarea, button')]"
        ".filter((one) => !(one.labels && one.labels.length) && !one.textContent.trim()).length"
    )
    assert page.run(unlabelled) == 0
    colours = "getComputedStyle(document.body).backgroundColor"
    found = []
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.call("Emulation.setEmulatedMedia", features=[feature])
        found.append(page.run(colours))
    assert found == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"]
