"""Disks, processes, signals and command lines. Nothing here knows of deliberation."""
