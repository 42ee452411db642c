"""The groups of `launch.py bench`, and their shared code."""
