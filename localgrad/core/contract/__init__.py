"""The contract: batches, rules, states, losses, and what is said about bad input."""
