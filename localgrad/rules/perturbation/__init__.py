"""Rules that disturb a model and look at what becomes of the loss: no derivative is taken."""
