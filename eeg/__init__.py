"""From a hospital's files to int16 at 256 Hz, and who trains on them."""
