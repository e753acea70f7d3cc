"""What the trainer is compared with: the same models, written as others write them."""
