"""Commands for data sets of images."""
