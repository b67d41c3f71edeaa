"""What a checkpoint's sub-networks are worth: accuracy, calibration and a picture of both."""
