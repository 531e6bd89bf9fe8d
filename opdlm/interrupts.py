"""The signals that ask a command to stop: Ctrl-C, SIGTERM (`kill`, Slurm, Kubernetes) and SIGUSR1 (Slurm)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from types import FrameType
from typing import NoReturn

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
received: list[int] = []
"""The signals that `interrupt` has got."""


def interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt(number). Schedulers may send a signal twice: the second does not disturb the
    cleaning up, but a second Ctrl-C does.
    """
    received.append(number)
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


@contextmanager
def on_stop_signals(handle: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Inside the block `handle` gets the signals. A handler of the caller, or an ignored Ctrl-C (nohup), is
    kept. In a thread nothing changes, as only the main thread receives signals.
    """
    is_main_thread = current_thread() is main_thread()
    wanted = [number for number in signal.Signals if number.name in NAMES and is_main_thread]
    ours = (signal.SIG_DFL, signal.default_int_handler, interrupt)
    before = {number: found for number in wanted if (found := signal.getsignal(number)) in ours}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block the signals raise KeyboardInterrupt(number), also where a library turns that into an
    error of its own, as compiled code may. One that is lost in a callback, which Python only reports, is sent
    again.
    """
    received.clear()
    report = sys.unraisablehook

    def send_again(lost: sys.UnraisableHookArgs) -> None:
        if lost.exc_type is not KeyboardInterrupt or not received:
            report(lost)
            return
        signal.signal(received[-1], interrupt)
        Timer(0.05, os.kill, (os.getpid(), received[-1])).start()

    with on_stop_signals(interrupt):
        sys.unraisablehook = send_again
        try:
            yield
        except Exception as error:
            if received:
                raise KeyboardInterrupt(received[0]) from error
            raise
        finally:
            sys.unraisablehook = report
