"""Handles disks, processes, signals and command lines; knows nothing of deliberation."""
