"""Finished runs beside the published figures. Only `report` and `evaluate` import it."""
