"""Prompts, evaluation tasks and documents as token ids."""
