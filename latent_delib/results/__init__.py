"""Finished runs beside the published figures. Only commands import it."""
