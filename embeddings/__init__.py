"""Ids to vectors: table groups, their sharding plan, their optimizers."""
