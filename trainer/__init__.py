"""The training library: data, model, loss, step, loop, checkpoint, metrics, snapshot."""
