"""What every process stands on: devices, the process group, logs, files. Knows no options."""
