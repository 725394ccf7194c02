"""``python -m pipeline COMMAND ...`` is ``vlae COMMAND ...``."""

from pipeline.cli import console

if __name__ == "__main__":
    console()
