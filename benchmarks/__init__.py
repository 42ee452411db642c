"""Claims and the commands that make them; imported by nobody."""
