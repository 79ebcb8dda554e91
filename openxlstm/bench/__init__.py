"""Measurements: commands that print a number only after the result behind it was checked. Never timed tests."""
