"""`opdlm convert`: rollouts, training steps, the run from start to end."""
