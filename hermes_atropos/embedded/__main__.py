"""``python -m hermes_atropos.embedded``: the embedded model as a process that speaks vLLM's protocol."""

from __future__ import annotations

import argparse
import os
import sys


def main() -> None:
    parser = argparse.ArgumentParser("python -m hermes_atropos.embedded", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="who can connect can change the weights")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; the address is printed")
    parser.add_argument("--checkpoint", metavar="DIR", help="a Llama in Hugging Face's format")
    parser.add_argument("--served-model-name", default="embedded", help="what clients call it")
    options = parser.parse_args()
    # Several threads would spin for each other between the small steps of a small model.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    from hermes_atropos.embedded.http import serve
    from hermes_atropos.embedded.server import EmbeddedServer
    from hermes_atropos.errors import ConfigurationError

    try:
        server = EmbeddedServer(checkpoint=options.checkpoint)
        serve(server, options.host, options.port, options.served_model_name)
    except ConfigurationError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
