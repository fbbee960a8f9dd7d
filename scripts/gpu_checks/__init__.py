"""What `scripts/gpu_check` measures: one module for each kind of check, each a function of a `Target` and a `Plan`."""
