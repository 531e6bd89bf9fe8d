"""vLLM: an engine for rollouts, and a plugin that serves students."""
