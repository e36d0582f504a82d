"""Figures of finished runs: numbers first, as rows, then pictures of them.

A function gives the rows of a figure, dicts with the same keys, which are its
CSV; another draws them, and nothing else. Where there is nothing to draw, the
first says why, in a string.
"""
