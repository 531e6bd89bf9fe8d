"""vLLM: an engine for responses of teacher and student, and a plugin that serves students."""
