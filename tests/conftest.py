"""Settings that must be made before torch is imported."""

import os

# Tests share the machine's few cores with processes that they start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
