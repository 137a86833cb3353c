"""Small flax.nnx blocks that operators and models are made of."""
