"""The attention backend: dense attention for prompts, extent decode for every generated token."""
