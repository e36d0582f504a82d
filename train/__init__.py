"""The training job: run from a checkout, not part of the wheel."""
