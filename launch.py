#!/usr/bin/env python3
"""fast_spatial's command line: `launch.py COMMAND --help` lists the flags. See fast_spatial/commands.py."""

import sys

from fast_spatial.commands import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
