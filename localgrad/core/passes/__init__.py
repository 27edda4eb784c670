"""Running a window: forward, backward, and what is carried from one to the next."""
