"""What is asked of a run, and the config that it comes to."""
