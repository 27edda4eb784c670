"""The learning rules, one file a rule or close family."""
