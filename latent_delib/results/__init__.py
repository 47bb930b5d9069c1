"""Finished runs beside the published figures. Only `report` and the plots of `evaluate` import
it.
"""
