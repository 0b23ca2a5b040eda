"""Prepare a dataset from images, with Ray Data."""
