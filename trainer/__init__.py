"""Everything between a prepared dataset and a finished run."""
