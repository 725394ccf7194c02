"""Images found by their codes: neighbours, scores by class, near-duplicates."""
