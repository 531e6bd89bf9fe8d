"""`opdlm serve`: an HTTP server that answers as OpenAI's API does."""

from __future__ import annotations

import argparse

import opdlm
from opdlm.cli.flags import Parser, Verbs, add_compile, add_decode_flags, add_dtype, add_verb, one_mode_config
from opdlm.errors import ConfigError

EXAMPLES = """  opdlm serve runs/tiny/model --mode lossless
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "add 47 38"}]}'"""


def add_serve(verbs: Verbs) -> None:
    add_verb(
        verbs,
        "serve",
        run,
        add_serve_flags,
        summary="answer over HTTP as OpenAI's API does",
        description="Serve a folder written by `opdlm convert` (--mode ar: any checkpoint) with our own "
        "decoder: /v1/chat/completions, /v1/completions, streamed or not, and a page to chat on. Requests "
        "share forwards, each with its own settings. Flags say what a request does not. Needs pip install "
        "'opdlm[serve]'.",
        examples=EXAMPLES,
    )


def add_serve_flags(parser: Parser) -> None:
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: other machines too (default: 127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free one (default: 8000)")
    parser.add_argument("--name", help="of the model in requests (default: DIR)")
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="wanted from requests; several times: one of them; or $OPDLM_API_KEY, which `ps` does not show",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        metavar="URL",
        help="a web page whose scripts may read the answers; several times, or '*' for all",
    )
    parser.add_argument(
        "--max-rows", type=int, default=16, metavar="N", help="responses decoded at once (default: 16)"
    )
    parser.add_argument(
        "--max-waiting",
        type=int,
        default=1024,
        metavar="N",
        help="responses that wait at most; further requests get status 429 (default: 1024)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help="prompt and response together, in tokens (default: the context, at most 4096)",
    )
    parser.add_argument(
        "--request-log", metavar="FILE", help="append a line of JSON per request; /dev/stdout prints them"
    )
    add_dtype(parser)
    add_compile(parser, "decode with torch.compile")
    add_decode_flags(parser, leave_out=("batch_size", "logprobs"))


def run(options: argparse.Namespace) -> int:
    if not all(options.api_key or ()):
        raise ConfigError(
            "--api-key is empty, which would protect nothing: give a key, or leave it out for $OPDLM_API_KEY."
        )
    opdlm.serve(
        options.folder,
        one_mode_config(options, is_sampled=True),  # requests have temperatures of their own
        host=options.host,
        port=options.port,
        name=options.name,
        api_key=options.api_key or (),
        cors_origins=options.cors_origin or (),
        max_rows=options.max_rows,
        max_waiting=options.max_waiting,
        max_length=options.max_length,
        dtype=options.dtype,
        compile=options.compile,
        request_log=options.request_log,
    )
    return 0
