"""What is wrong with files, and which decoding gives right pixels on this machine."""
