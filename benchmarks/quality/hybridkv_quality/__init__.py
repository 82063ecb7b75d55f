"""A suite of picture questions that separates KV-cache methods, and what runs it."""
