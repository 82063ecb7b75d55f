"""The worker's side: per-request tables and what happens when a prefill ends."""
