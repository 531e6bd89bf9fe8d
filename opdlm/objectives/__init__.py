"""What is trained: denoising states, their targets, the divergence, and random masks."""
