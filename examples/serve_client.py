"""A client of `trtq serve`, with the standard library only.

    trtq serve onnx                                       # in another terminal
    python examples/serve_client.py --prompt 7 -o seven.png

With the `openai` package the request is `client.images.generate(model="onnx", prompt="7")`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def request(url: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON answer to a GET, or to a POST of `body`."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("TRTQ_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
        return json.load(answer)


def main() -> int:
    """Parse the arguments, ask for images, write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server")
    parser.add_argument("--model", help="model name (default: the first that the server lists)")
    parser.add_argument("--prompt", required=True, help="a text, or the class of a digit")
    parser.add_argument("--images", type=int, default=1, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as calibrated)")
    parser.add_argument("-o", "--output", type=Path, default=Path("image.png"), help="PNG file")
    options = parser.parse_args()
    try:
        models = [model["id"] for model in request(f"{options.url}/v1/models")["data"]]
        answer = request(
            f"{options.url}/v1/images/generations",
            {
                "model": options.model or models[0],
                "prompt": options.prompt,
                "n": options.images,
                "seed": options.seed,
                "steps": options.steps,  # None becomes null, which counts as omitted.
            },
        )
    except urllib.error.HTTPError as err:
        # The server answers errors in OpenAI's form: what is wrong, and with which field.
        error = json.load(err)["error"]
        print(f"{err.code}: {error['message']}", file=sys.stderr)
        return 1
    except urllib.error.URLError as err:
        print(f"no server at {options.url}: {err.reason}", file=sys.stderr)
        return 1
    for index, image in enumerate(answer["data"]):
        suffix = f"-{index}" if options.images > 1 else ""
        path = options.output.with_stem(options.output.stem + suffix)
        path.write_bytes(base64.b64decode(image["b64_json"]))
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
