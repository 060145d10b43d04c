"""What surrounds one training run."""
