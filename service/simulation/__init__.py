"""Simulation of the scheduler in virtual time."""
