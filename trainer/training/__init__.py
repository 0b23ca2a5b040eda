"""What a worker does: data, step, loop, evaluation and export."""
