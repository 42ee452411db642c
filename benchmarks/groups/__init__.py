"""The groups of `launch.py bench`, and what they share."""
