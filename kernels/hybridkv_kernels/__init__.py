"""HybridKV's operations on a paged KV pool; import each one from its own folder."""

from .pages import PAGE, Backend

__all__ = ["PAGE", "Backend"]
