"""Images to a prepared dataset, with Ray Data."""
