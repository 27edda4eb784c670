"""A model taken apart: adapters, cells and their synapses, and what is known of each."""
