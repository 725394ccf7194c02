"""Commands that train, choose, judge and keep models."""
