"""Faults on purpose, around real servers, and the laws by which what clients saw is judged."""
