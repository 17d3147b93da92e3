"""Cells of a study, their status, and published figures beside them."""
