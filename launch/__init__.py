"""Where it runs: the command line and the TorchX components."""
