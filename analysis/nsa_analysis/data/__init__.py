"""Result files, points and tables."""
