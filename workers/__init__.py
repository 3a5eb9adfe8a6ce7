"""Ray actors and how a job reaches them; the only package that imports ray."""

import os

# Read by Ray when it is imported: a stage that outlives its crew must not start a cluster of its own.
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
