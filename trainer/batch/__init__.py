"""Batch sizes by measurement on the workers."""
