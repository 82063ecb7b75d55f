"""The page at `GET /hybridkv`: one file, served with a policy under which nothing but its own code runs."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping
from importlib.resources import files


@functools.cache
def page_html() -> str:
    """The page, with its style and script."""
    return files("hybridkv_vllm.observe").joinpath("page.html").read_text(encoding="utf-8")


@functools.cache
def page_headers() -> Mapping[str, str]:
    """Headers for the page.

    The policy names its style and its script by their digests: what a figure might smuggle in does not run,
    and text never becomes HTML (trusted types). The page talks to its own server only, and nobody frames it.
    """
    html = page_html()
    directives = (
        "default-src 'none'",
        f"script-src '{_source_hash(html, 'script')}'",
        f"style-src '{_source_hash(html, 'style')}'",
        "connect-src 'self'",
        # An empty icon, so that browsers do not ask for one.
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return {
        "Content-Security-Policy": "; ".join(directives),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _source_hash(html: str, tag: str) -> str:
    """The source expression of the one inline element of that tag."""
    text = html.split(f"<{tag}>")[1].split(f"</{tag}>")[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
