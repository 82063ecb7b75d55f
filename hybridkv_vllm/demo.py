"""`make demo`: serves the small trained model, asks about real pictures, shows what compression saved."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hybridkv_quality.chat import http_chat
from hybridkv_quality.model_path import model_folder
from hybridkv_quality.sample import Sample
from hybridkv_quality.tasks import suite_samples
from openai import DefaultHttpxClient, OpenAI
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hybridkv_vllm import exit_codes
from hybridkv_vllm.observe.api import HeadsResponse, Stats
from hybridkv_vllm.observe.heads import RequestHeads
from hybridkv_vllm.plan import arena_blocks, ceil_pages
from hybridkv_vllm.server import Server, ServerFailed, serve
from hybridkv_vllm.stops import orderly_stops

BUDGET = 0.10
PROMPT_TOKENS = 2048
MODEL_NAME = "dominoes"
SERVER_ARGUMENTS = (
    "--attention-backend",
    "hybridkv",
    "--additional-config.hybridkv.budget",
    str(BUDGET),
    "--max-model-len",
    "8192",
    "--max-num-seqs",
    "8",
    "--max-num-batched-tokens",
    "2048",
    "--served-model-name",
    MODEL_NAME,
    "--limit-mm-per-prompt",
    '{"image": 16}',
)


def ask(console: Console, server: Server, sample: Sample) -> tuple[str, int]:
    """Streams one answer; returns it and the prompt's length in tokens."""
    # Not by way of a proxy that the environment names.
    direct = DefaultHttpxClient(trust_env=False)
    client = OpenAI(base_url=server.url + "/v1", api_key="none", http_client=direct)
    messages: Any = http_chat(sample)
    stream = client.chat.completions.create(
        model=MODEL_NAME,
        messages=messages,
        max_tokens=sample.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    answer, prompt_tokens = "", 0
    console.print("[bold]answer:[/]  ", end="")
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            piece = chunk.choices[0].delta.content
            console.print(piece, end="", markup=False, highlight=False)
            answer += piece
        if chunk.usage:
            prompt_tokens = chunk.usage.prompt_tokens
    console.print()
    return answer.strip(), prompt_tokens


def save_pictures(sample: Sample, folder: Path) -> int:
    """Writes what the model is shown, to be looked at; returns how many."""
    pictures = [part for part in sample.messages[0].parts if isinstance(part, Image.Image)]
    for number, picture in enumerate(pictures, start=1):
        picture.save(folder / f"picture-{number}.png")
    return len(pictures)


def saved_table(prompt_tokens: int, stats: Stats, heads: RequestHeads) -> Table:
    """What the one compressed request kept, gave back and fetched again."""
    before = ceil_pages(prompt_tokens)
    table = Table(title=f"One request at budget {BUDGET:.0%}", show_header=False)
    table.add_row("prompt tokens", str(prompt_tokens))
    table.add_row("blocks the prompt took", str(before))
    table.add_row("blocks given back", str(stats.blocks_freed))
    arena = arena_blocks(BUDGET, prompt_tokens)
    table.add_row("blocks held while decoding", f"{before - stats.blocks_freed + arena} + generated tokens")
    table.add_row("kept tokens per KV head (mean)", f"{stats.kept_tokens:.1f}")
    recalling = sum(head.recalled for layer in heads.layers for head in layer)
    table.add_row("static heads", str(stats.heads.get("static", 0)))
    table.add_row("dynamic heads", f"{stats.heads.get('dynamic', 0)}, of which {recalling} recall chunks")
    table.add_row("chunks fetched from host memory", str(stats.chunks_recalled))
    already = f"{stats.chunks_hit} ({stats.hit_rate:.0%})" if stats.hit_rate is not None else "none"
    table.add_row("chunks that were on the GPU already", already)
    return table


def main() -> int:
    """Runs the demo; exit code 1 if it is stopped or fails, nothing was compressed or the answer is wrong."""
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="hybridkv-demo-"))
    try:
        # However it ends, the server must not be left behind with the GPU.
        with orderly_stops():
            return _run(console, folder)
    except ServerFailed as error:
        # As it is: rich would take what stands in the log in brackets for markup.
        console.print(str(error), style="bold red", markup=False, highlight=False)
    except KeyboardInterrupt:
        print("hybridkv demo: stopped", file=sys.stderr)
    return exit_codes.PROBLEM


def _run(console: Console, folder: Path) -> int:
    (sample,) = suite_samples(["recall"], tokens=PROMPT_TOKENS, contexts=1)
    started = time.monotonic()
    with ExitStack() as running:
        with console.status("starting vllm serve --attention-backend hybridkv ..."):
            server = running.enter_context(serve(model_folder(), SERVER_ARGUMENTS, folder / "server.log"))
        console.print(f"server up after {time.monotonic() - started:.0f} s: {server.url}")
        count = save_pictures(sample, folder)
        console.print(
            f"[dim]{count} pictures in {escape(str(folder))}: each domino has a name (colour and letter) on "
            "its left and points to the next one on its right[/]\n"
        )
        console.print(f"[bold]question:[/] {sample.messages[-1].parts[-1]}, and what it points to")
        answer, prompt_tokens = ask(console, server, sample)
        stats = Stats.model_validate(server.get("/hybridkv/stats").json())
        heads = HeadsResponse.model_validate(server.get("/hybridkv/heads").json()).requests
    if not stats.requests_compressed or not heads:
        console.print(f"[bold red]nothing was compressed[/]; see {escape(str(folder / 'server.log'))}")
        return exit_codes.PROBLEM
    if answer != sample.answer:
        console.print(f"[bold red]wrong[/], the pictures say: {sample.answer}", highlight=False)
        return exit_codes.PROBLEM
    console.print("[bold green]right[/], word for word\n")
    console.print(saved_table(prompt_tokens, stats, heads[0]))
    console.print(
        "[dim]Static heads are pruned for good. Dynamic heads keep all of the prompt in host memory and "
        "fetch the chunks of 16 tokens that a step needs.[/]"
    )
    return exit_codes.OK


if __name__ == "__main__":
    sys.exit(main())
