"""Tests; `python -m tests.parity` is a command."""
