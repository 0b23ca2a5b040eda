"""What a run leaves: its files, their formats and their readers."""
