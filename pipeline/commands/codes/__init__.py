"""Commands that use a model: codes, files and pictures."""
