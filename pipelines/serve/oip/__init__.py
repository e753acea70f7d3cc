"""The open inference protocol, version 2, over gRPC and over HTTP: requests as named tensors."""
