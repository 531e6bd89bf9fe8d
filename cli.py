"""Run `opdlm` from a checkout: `python cli.py convert tiny`."""

from opdlm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
