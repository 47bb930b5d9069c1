"""Shows finished runs beside the published figures. Only commands import this folder."""
