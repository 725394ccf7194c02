"""The networks that a VLAE is put together from."""
