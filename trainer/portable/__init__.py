"""A snapshot's model as one function of padded tensors, for runtimes that know nothing of this project."""
