"""Exit codes of every `hybridkv` command, in one place: scripts act on them."""

OK = 0
# A problem was found, or the work failed or was stopped; what to do is said beside it.
PROBLEM = 1
# Wrong arguments, or what they name is not there; nothing was done. argparse ends with the same code.
USAGE = 2
