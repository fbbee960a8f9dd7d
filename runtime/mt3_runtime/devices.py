"""Where a model may run, and how many rows side by side."""

DEVICES = ("auto", "cpu")
DEFAULT_SLOTS = 8  # more rows a step gain little on a CPU and cost 31 MB of cache each
