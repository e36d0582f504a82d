"""TFDS builders of the datasets that TFDS does not have."""
