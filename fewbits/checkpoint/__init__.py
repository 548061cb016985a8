"""Checkpoints that survive crashes and notice every changed byte."""
