"""From a sequence log in Parquet to RequestBatches."""
