"""Run `opdlm` from a checkout: `python cli.py convert tiny`."""

from opdlm.__main__ import run

if __name__ == "__main__":
    raise SystemExit(run())
