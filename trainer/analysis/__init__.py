"""What the tables and the model of a run have learned, as numbers; `pipelines.analyze` draws them."""
