"""Statistics of a data set, from its own files."""
