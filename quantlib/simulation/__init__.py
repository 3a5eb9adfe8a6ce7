"""What a job would take on a cluster that is not there: the product's schedule on a model of its costs."""
