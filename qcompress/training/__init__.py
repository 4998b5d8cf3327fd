"""One training loop, and what it stands on: batches, losses, optimizers, penalties, saved states, ranks."""
