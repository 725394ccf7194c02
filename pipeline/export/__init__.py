"""Models for other programs: as graphs without this package, and as a folder for a model hub."""
