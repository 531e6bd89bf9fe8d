"""`python -m opdlm`: what `accelerate launch -m opdlm` runs."""

from opdlm.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
