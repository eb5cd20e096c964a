"""Files that others have published: where they lie, how they are read, what their tensors are called."""
