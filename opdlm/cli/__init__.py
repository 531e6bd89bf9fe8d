"""The command line: a file per verb, with its flags and what it does (a call of `opdlm.api`, and a print).

`main` parses and turns errors into exit codes; `flags` has what verbs share. `chat` is in `generate`, `eval`
and `report` in `evaluate`, `merge` and `verify` in `export`, `recipes` and `env` in `main`; the others are
named as they are called.
"""
