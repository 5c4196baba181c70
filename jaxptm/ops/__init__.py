"""Pure functions of arrays and a key: what runs inside the training step around the model."""
