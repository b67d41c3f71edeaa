"""Evaluation of a checkpoint's sub-networks: accuracy, calibration, cascades, and plots of them."""
