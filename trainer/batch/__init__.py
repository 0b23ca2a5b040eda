"""The batch size and precision of a run, found by measuring on the workers."""
