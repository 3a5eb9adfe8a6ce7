"""A job as data and as a loop: options, plan, work prefix, conversion, report."""
