"""From probabilities to events, numbers and pictures."""
