"""Ray actors and how a job reaches them; the only package that imports ray."""
