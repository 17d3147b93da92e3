"""A study of finished runs as fits, a table, figures and a page."""
