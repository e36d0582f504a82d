"""Programs to start from, each one file."""
