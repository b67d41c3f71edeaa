"""Training as in the paper: the data and the objective of a step, the loop around it, and the files that it keeps."""
