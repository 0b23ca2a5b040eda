"""The files of a run: their formats, writers and readers."""
