"""Models are trained here by one loop, which stands on losses, optimizers, penalties, saved states and ranks."""
