"""For every test: one thread. Models of a few thousand weights gain nothing from more and lose much under load."""

import torch

torch.set_num_threads(1)
