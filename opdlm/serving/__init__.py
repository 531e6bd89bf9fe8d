"""`opdlm serve`: an OpenAI-compatible server."""
