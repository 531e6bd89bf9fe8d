"""`python -m opdlm`, which `accelerate launch -m opdlm` runs, and the command `opdlm`."""

import signal


def run() -> int:
    """Read and run the command line; its exit code. Ctrl-C during the imports ends the process without a
    traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from opdlm.cli.main import main

    return main()


if __name__ == "__main__":
    raise SystemExit(run())
