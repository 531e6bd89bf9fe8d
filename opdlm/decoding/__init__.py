"""The sampler. It travels with every result folder."""
