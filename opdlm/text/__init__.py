"""`opdlm train` and `opdlm eval --text`: objectives on given text."""
