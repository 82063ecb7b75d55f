"""`hybridkv inspect`: what became of each KV head of one prompt, on a running server, as a picture."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridkv_quality.output_file import check_writable
from hybridkv_quality.settings import EvalError, UsageError
from hybridkv_vllm import exit_codes

if TYPE_CHECKING:
    from hybridkv_quality.sample import Sample
    from hybridkv_quality.server_target import OpenAIServer
    from hybridkv_vllm.config import ServerOptions
    from hybridkv_vllm.observe.heads import RequestHeads

DESCRIPTION = """\
Draws a map of a prompt's KV heads over layers: the classifier's figure, the verdict, the budget of each.

With --ask or --picture the server is asked first, and the map is of that prompt; else it is of the last
prompt that the server has compressed. The server needs VLLM_PLUGINS=hybridkv,hybridkv_api. If it has an API
key, give that in the environment variable OPENAI_API_KEY.
"""
EPILOG = """\
examples:
  hybridkv inspect --url http://localhost:8000/v1 --out heads.png
  hybridkv inspect --url http://localhost:8000/v1 --out heads.png --picture photo.jpg --ask "What is this?"

exit code: 0 done, 1 there is no compressed prompt, or the server failed, 2 wrong arguments
"""
NEEDED = ("matplotlib", "PIL", "openai", "httpx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `hybridkv inspect`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--url", required=True, help="of a running server, such as http://localhost:8000/v1")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture to write (PNG)")
    parser.add_argument("--ask", metavar="TEXT", help="what to ask first")
    parser.add_argument(
        "--picture", type=Path, action="append", default=[], metavar="FILE", help="shown with it; repeatable"
    )
    parser.add_argument("--budget", type=float, help="of that request (default: the server's)")
    parser.add_argument("--served-model", metavar="NAME", help="if the server has several")
    parser.add_argument("--json", action="store_true", help="print the map as JSON")


def run(args: argparse.Namespace) -> int:
    """Draws and reports; returns the exit code."""
    try:
        missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(f"{', '.join(missing)} missing: pip install 'hybridkv-vllm[eval]'")
        heads, options = _inspect(args)
    except UsageError as error:
        print(f"hybridkv inspect: {error}", file=sys.stderr)
        return exit_codes.USAGE
    except EvalError as error:
        print(f"hybridkv inspect: {error}", file=sys.stderr)
        return exit_codes.PROBLEM
    from hybridkv_quality.plots import draw_heads

    title = f"{options.policy}: a prompt of {heads.prompt_tokens} tokens"
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        draw_heads(heads, options.classifier_name, options.theta, title, args.out)
    except (OSError, ValueError) as error:
        print(f"hybridkv inspect: {args.out} cannot be written: {error}", file=sys.stderr)
        return exit_codes.PROBLEM
    if args.json:
        print(json.dumps(_as_json(heads, options), indent=2))
        return exit_codes.OK
    kinds = Counter(head.type for layer in heads.layers for head in layer)
    recalling = sum(head.recalled for layer in heads.layers for head in layer)
    print(
        f"{heads.prompt_tokens} tokens, {heads.arena_pages} pages kept; KV heads: {kinds['static']} static, "
        f"{kinds['dynamic']} dynamic, of which {recalling} recall; map: {args.out}"
    )
    return exit_codes.OK


def _inspect(args: argparse.Namespace) -> tuple[RequestHeads, ServerOptions]:
    from hybridkv_quality.server_target import OpenAIServer, ServerSettings

    if args.budget is not None and not 0 < args.budget <= 1:
        raise UsageError(f"--budget must be above 0 and at most 1, got {args.budget:g}")
    _check_out(args.out)
    if args.ask is None and not args.picture and args.budget is not None:
        raise UsageError("--budget is of a question: add --ask or --picture")
    sample = _sample(args) if args.ask is not None or args.picture else None
    server = OpenAIServer(ServerSettings(url=args.url, model=args.served_model))
    if server.options is None:
        raise UsageError(
            f"--url {args.url}: the server tells no figures of HybridKV; start it with "
            "--attention-backend hybridkv and VLLM_PLUGINS=hybridkv,hybridkv_api"
        )
    wanted = "" if sample is None else server.ask(sample, args.budget).id
    return _find(server, wanted), server.options


def _check_out(out: Path) -> None:
    """Sees that the picture can be written, before the server is asked.

    Raises:
        UsageError: it cannot be, or is of no kind that can be drawn.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    if out.suffix and out.suffix[1:].lower() not in kinds:
        raise UsageError(f"--out {out}: {out.suffix} is none of {', '.join(kinds)}; name a .png")
    try:
        check_writable(out)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _sample(args: argparse.Namespace) -> Sample:
    """The question, and room for the two tokens that let a compression end."""
    from PIL import Image, UnidentifiedImageError

    from hybridkv_quality.sample import Message, Sample

    parts: list[Any] = []
    for path in args.picture:
        try:
            parts.append(Image.open(path).convert("RGB"))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UsageError(f"--picture {path}: {error}") from None
    if args.ask is not None:
        parts.append(args.ask)
    return Sample("inspect", "prompt", (Message("user", tuple(parts)),), "", "inspect", max_tokens=2)


def _find(server: OpenAIServer, wanted: str) -> RequestHeads:
    """The request whose id contains `wanted`, or the newest; its figures may come in a moment late.

    Raises:
        EvalError: there is none.
    """
    from hybridkv_quality.server_target import HEADS_SECONDS

    deadline = time.monotonic() + HEADS_SECONDS
    while True:
        found = next((heads for heads in server.heads() if wanted in heads.request_id), None)
        if found is not None:
            return found
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert server.options is not None
    raise EvalError(
        "the server has compressed no such prompt; it leaves prompts of fewer than "
        f"{server.options.min_prompt_tokens} tokens as they are"
    )


def _as_json(heads: RequestHeads, options: ServerOptions) -> dict[str, Any]:
    judged = {"policy": options.policy, "classifier": options.classifier_name, "theta": options.theta}
    return judged | heads.model_dump(mode="json")
