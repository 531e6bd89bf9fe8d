"""The model: slots, attention, caches. It travels with every result folder."""
