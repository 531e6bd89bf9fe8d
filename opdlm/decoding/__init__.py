"""The sampler: from prompts to rollouts, one forward pass per step. Needs torch and transformers only."""
