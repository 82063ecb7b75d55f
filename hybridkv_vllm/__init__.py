"""HybridKV for vLLM: per-head KV-cache compression for multimodal serving."""

__version__ = "0.1.0"
