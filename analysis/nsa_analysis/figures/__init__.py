"""Panels drawn with matplotlib from the tables of this package."""
