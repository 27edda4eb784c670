"""The contract, the model adapters, the taps and the passes that every rule shares."""
