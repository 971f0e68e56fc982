"""Measurements on this machine: how fast, how large and how exact the losses are."""
