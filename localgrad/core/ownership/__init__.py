"""Whose is each number of a program? Owners, followed through its equations."""
