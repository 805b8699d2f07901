"""Jobs: one queue, one worker, states on disk."""
