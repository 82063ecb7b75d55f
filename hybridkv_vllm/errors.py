"""The one error with which HybridKV refuses to start."""


class HybridKVConfigError(RuntimeError):
    """A configuration that HybridKV cannot serve; the message is one line and names the remedy.

    Not a ValueError: pydantic, which validates vLLM's own configuration, would wrap one in a report of
    several lines.
    """

    def __init__(self, message: str) -> None:
        super().__init__(f"hybridkv: {message}")
