"""The model: slots, attention, caches, and the diffusion model on them. Needs torch and transformers only."""
