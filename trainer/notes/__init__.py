"""What is said about runs: notes, report, pictures and findings."""
