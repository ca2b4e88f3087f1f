"""Runs on machines that a scheduler lends."""
