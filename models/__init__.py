"""SuperViT: one vision transformer whose single set of weights runs at many costs."""
