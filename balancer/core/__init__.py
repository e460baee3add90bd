"""Decisions: plain Python that takes values and `now` and returns values. No await, no clock, no socket, no logger."""
