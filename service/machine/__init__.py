"""Measures the state of the machine: CPUs, memory, pressure and GPUs."""
