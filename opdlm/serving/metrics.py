"""What the server did since its start, in the text format of Prometheus (`GET /metrics`); the request log."""

from __future__ import annotations

import logging
import logging.handlers
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from opdlm.decoding.rollout import Rollout
from opdlm.errors import ConfigError
from opdlm.serving.decode_thread import DecodeThread

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds (seconds) of the latency histogram."""


class Metrics:
    """Counters of the event loop's thread."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.latencies = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0

    def count_request(self, path: str, status: int, seconds: float) -> None:
        self.requests[path, status] += 1
        self.latencies[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def count_response(self, rollout: Rollout) -> None:
        self.tokens["prompt"] += len(rollout.prompt_ids)
        self.tokens["generated"] += rollout.num_response
        self.tokens["forwards"] += rollout.num_forwards

    def text(self, thread: DecodeThread) -> str:
        return "".join(f"opdlm_{line}\n" for line in self._lines(thread)).replace("opdlm_#", "#")

    def _lines(self, thread: DecodeThread) -> Iterator[str]:
        yield "# TYPE opdlm_requests_total counter"
        for (path, status), count in sorted(self.requests.items()):
            yield f'requests_total{{path="{path}",status="{status}"}} {count}'
        tokens = self.tokens
        gauges = {
            "responses_waiting": thread.num_waiting,
            "responses_running": len(thread.running),
            "prefix_tokens_kept": thread.prefixes.num_tokens,
            "tokens_per_forward": tokens["generated"] / max(1, tokens["forwards"]),
        }
        counters = {
            "prompt_tokens_total": tokens["prompt"],
            "prefix_hits_total": thread.prefixes.num_hits,
            "prefix_tokens_reused_total": thread.prefixes.num_reused,
            "generated_tokens_total": tokens["generated"],
            "row_forwards_total": tokens["forwards"],
            "decoding_seconds_total": thread.busy_seconds,
        }
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, value in values.items():
                yield f"# TYPE opdlm_{name} {kind}"
                yield f"{name} {value:.10g}"
        yield "# TYPE opdlm_request_seconds histogram"
        total = 0
        for bound, count in zip((*BOUNDS, "+Inf"), self.latencies, strict=True):
            total += count
            yield f'request_seconds_bucket{{le="{bound}"}} {total}'
        yield f"request_seconds_sum {self.seconds:.6f}"
        yield f"request_seconds_count {total}"


def open_request_log(path: str) -> logging.Logger:
    """A log whose messages are appended to a file as they are. The file may be moved away to start a new one.
    ConfigError if it cannot be written.
    """
    try:
        handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"request_log ({path}) cannot be written: {error.strerror}.") from error
    log = logging.Logger("opdlm.requests")
    log.addHandler(handler)
    return log
