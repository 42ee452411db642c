"""Basics of every process: devices, process group, logs and files. Independent of the options."""
