"""Notes, report, plots and findings about runs."""
