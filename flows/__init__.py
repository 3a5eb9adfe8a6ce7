"""Prefect flows, their parameters, artifacts and deployments, and the `quantmill` command."""
