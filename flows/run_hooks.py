"""What every flow has Prefect call when a run's state changes: ``@flow(..., **RUN_HOOKS)``."""

from flows.notifications import NOTIFIED, NOTIFIED_OF_TROUBLE
from flows.served_runs import note_run

RUN_HOOKS = {**NOTIFIED, "on_running": [note_run]}
# Of passes over a prefix, which are many: only trouble is told.
PASS_HOOKS = {**NOTIFIED_OF_TROUBLE, "on_running": [note_run]}
