"""Trained models made small or written for other runtimes."""
