"""`hybridkv bench` from a checkout: stock vLLM against hybridkv, over HTTP."""

import sys

from hybridkv_vllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
