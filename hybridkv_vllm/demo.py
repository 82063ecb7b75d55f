"""`make demo`: serves a small model, asks about a real photograph, shows what compression saved."""

from __future__ import annotations

import base64
import io
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from hybridkv_vllm.observe.api import HeadsResponse, Stats
from hybridkv_vllm.observe.heads import RequestHeads
from hybridkv_vllm.plan import arena_blocks, ceil_pages
from hybridkv_vllm.server import Server, ServerFailed, serve
from hybridkv_vllm.tiny_model import sample_picture, write_tiny_model

BUDGET = 0.25
QUESTION = "Who is in the picture, and what does she wear?"
MAX_ANSWER_TOKENS = 48
SERVER_ARGUMENTS = (
    "--attention-backend",
    "hybridkv",
    "--additional-config.hybridkv.budget",
    str(BUDGET),
    # The small model sees the photograph as a few hundred tokens.
    "--additional-config.hybridkv.min_prompt_tokens",
    "128",
    "--max-model-len",
    "8192",
    "--max-num-seqs",
    "8",
    "--max-num-batched-tokens",
    "2048",
    "--served-model-name",
    "tiny",
)


def picture_url() -> str:
    """The photograph as a data URL."""
    buffer = io.BytesIO()
    sample_picture().save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ask(console: Console, server: Server) -> int:
    """Streams one answer; returns the prompt's length in tokens."""
    client = OpenAI(base_url=server.url + "/v1", api_key="none")
    stream = client.chat.completions.create(
        model="tiny",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture_url()}},
                    {"type": "text", "text": QUESTION},
                ],
            }
        ],
        max_tokens=MAX_ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    prompt_tokens = 0
    console.print(f"[bold]question:[/] {QUESTION}\n[bold]answer:[/] ", end="")
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            console.print(chunk.choices[0].delta.content, end="", markup=False, highlight=False)
        if chunk.usage:
            prompt_tokens = chunk.usage.prompt_tokens
    console.print("\n")
    return prompt_tokens


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
    """Runs the demo; exit code 1 if the server fails or nothing was compressed."""
    console = Console()
    folder = Path(tempfile.mkdtemp(prefix="hybridkv-demo-"))
    started = time.monotonic()
    try:
        with ExitStack() as running:
            with console.status("writing a small Qwen2.5-VL with random weights ..."):
                model = write_tiny_model(folder / "tiny-qwen2.5-vl")
            with console.status("starting vllm serve --attention-backend hybridkv ..."):
                server = running.enter_context(serve(model, SERVER_ARGUMENTS, folder / "server.log"))
            console.print(f"server up after {time.monotonic() - started:.0f} s: {server.url}")
            console.print("[dim]random weights answer with noise; the memory is real[/]\n")
            prompt_tokens = ask(console, server)
            stats = Stats.model_validate(server.get("/hybridkv/stats").json())
            heads = HeadsResponse.model_validate(server.get("/hybridkv/heads").json()).requests
    except ServerFailed as error:
        console.print(f"[bold red]{error}[/]", highlight=False)
        return 1
    if not stats.requests_compressed or not heads:
        console.print(f"[bold red]nothing was compressed[/]; see {folder / 'server.log'}")
        return 1
    console.print(saved_table(prompt_tokens, stats, heads[0]))
    console.print(
        "[dim]Static heads are pruned for good. Dynamic heads keep all of the prompt in host memory and "
        "fetch the chunks of 16 tokens that a step needs.[/]"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
