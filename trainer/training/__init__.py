"""What a worker does: data, training step, loop, evaluation and export."""
