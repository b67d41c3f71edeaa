"""Admission and batch scheduling. Pure: no torch, no threads, no clock, no waiting."""
