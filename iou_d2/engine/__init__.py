"""Training, checkpoints and their conversion."""
