"""Find damaged files, and the decoding that gives correct pixels on this machine."""
